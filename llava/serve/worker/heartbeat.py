"""A worker's side of registration: announce, send heartbeats, register again when forgotten, say goodbye.

One background task; nothing here is ever awaited by a request, so a controller that is slow or gone changes nothing
for running streams (spec/serve.md §4.4, W2, W4, W19).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any, Final

import httpx

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.serve.common.protocol import WorkerStatus
from llava.serve.common.security import authorization

logger = logging.getLogger(__name__)

_CALL_SECONDS: Final = 5.0
_FIRST_DELAY: Final = 0.5
_SPACING: Final = 0.1  # between two nudged heartbeats


class HeartBeat:
    """Keeps `worker_name` registered with a controller. `nudge()` after every change of the queue or the state."""

    def __init__(
        self,
        controller: str,
        worker_name: str,
        status: Callable[[], WorkerStatus],
        token: str | None,
        *,
        interval: float = WORKER_HEART_BEAT_INTERVAL,
        max_delay: float = 5.0,
    ) -> None:
        self.worker_name = worker_name
        self.registered = False
        self._status = status
        self._interval = interval
        self._max_delay = max_delay
        self._announced: object = None  # the state that the controller knows
        self._nudged = asyncio.Event()
        self._client = httpx.AsyncClient(
            base_url=controller, timeout=_CALL_SECONDS, headers=authorization(token), trust_env=False
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    def nudge(self) -> None:
        """Report soon, without waiting."""
        self._nudged.set()

    async def stop(self) -> None:
        """Leave the controller's list and end."""
        task, self._task = self._task, None
        if task is None:
            return
        while not task.done():
            task.cancel()  # again if need be: Python 3.11's wait_for may lose a cancellation
            await asyncio.wait({task}, timeout=0.5)
        if self.registered:
            with contextlib.suppress(httpx.HTTPError, OSError):
                await self._client.post("/unregister_worker", json={"worker_name": self.worker_name}, timeout=2)
        await self._client.aclose()

    async def _run(self) -> None:
        delay = _FIRST_DELAY
        while True:
            try:
                await self._report()
                delay = _FIRST_DELAY
                pause = self._interval
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                self._complain(error, delay)
                pause = delay * random.uniform(0.75, 1.25)  # many workers must not return in step
                delay = min(2 * delay, self._max_delay)
                await asyncio.sleep(pause)
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), pause)
                await asyncio.sleep(_SPACING)
            self._nudged.clear()

    async def _report(self) -> None:
        status = self._status()
        known = (tuple(status.model_names), status.state, status.progress)
        if self.registered and known == self._announced:
            body: dict[str, Any] = {"worker_name": self.worker_name, "queue_length": status.queue_length}
            reply = await self._client.post("/receive_heart_beat", json=body)
            reply.raise_for_status()
            if reply.json().get("exist") is True:
                return
        body = {"worker_name": self.worker_name, "check_heart_beat": True, "worker_status": status.model_dump()}
        reply = await self._client.post("/register_worker", json=body)
        reply.raise_for_status()
        if not self.registered:
            logger.info("Registered with the controller as %s.", self.worker_name)
        self.registered, self._announced = True, known

    def _complain(self, error: Exception, delay: float) -> None:
        self.registered = False
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, httpx.HTTPStatusError):
            reason = f"status {error.response.status_code}"
            if error.response.status_code == 401:
                reason += "; the controller has another token"
        logger.warning("The controller does not take the registration (%s); next try in %.1f s.", reason, delay)
