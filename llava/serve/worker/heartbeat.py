"""Registration and heartbeats of a worker.

They run in one background task that no request awaits, so that a slow or absent controller never delays a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Final

import httpx

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.serve.common.protocol import WorkerStatus
from llava.serve.common.security import authorization

logger = logging.getLogger(__name__)

_CALL_SECONDS: Final = 5.0
_FIRST_DELAY: Final = 0.5
_SPACING: Final = 0.1  # seconds between two triggered heartbeats


class HeartBeat:
    """Keeps `worker_name` registered with a controller; call `trigger` after changes of the queue or the state.

    `interval` is in seconds, as is `max_delay`, the longest pause between two attempts to register.
    """

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
        self._announced: object = None  # the state sent to the controller
        self._triggered = asyncio.Event()
        self._client = httpx.AsyncClient(
            base_url=controller, timeout=_CALL_SECONDS, headers=authorization(token), trust_env=False
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    def trigger(self) -> None:
        """Send a heartbeat soon, without waiting for it."""
        self._triggered.set()

    async def stop(self) -> None:
        """Unregister and end the task."""
        task, self._task = self._task, None
        if task is None:
            return
        while not task.done():
            task.cancel()  # repeated, since Python 3.11's wait_for may lose a cancellation
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
                self._log_failure(error, delay)
                pause = delay * random.uniform(0.75, 1.25)  # workers must not reconnect simultaneously
                delay = min(2 * delay, self._max_delay)
                await asyncio.sleep(pause)
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._triggered.wait(), pause)
                await asyncio.sleep(_SPACING)
            self._triggered.clear()

    async def _report(self) -> None:
        status = self._status()
        known = (tuple(status.model_names), status.state, status.progress)
        if self.registered and known == self._announced:
            body: dict[str, object] = {"worker_name": self.worker_name, "queue_length": status.queue_length}
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

    def _log_failure(self, error: Exception, delay: float) -> None:
        self.registered = False
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, httpx.HTTPStatusError):
            reason = f"status {error.response.status_code}"
            if error.response.status_code == 401:
                reason += "; the controller has a different token"
        logger.warning("Cannot register with the controller (%s); next try in %.1f s.", reason, delay)
