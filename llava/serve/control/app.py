"""The controller's routes: the registry over HTTP, probes in the background, streams passed on (spec/serve.md §3)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from llava.serve.common.metrics import Metrics
from llava.serve.common.middleware import forget_body, make_app, request_id_of
from llava.serve.common.protocol import (
    FRAME_MEDIA_TYPE,
    AddressBody,
    ErrorType,
    GenerateBody,
    HeartBeatBody,
    NameBody,
    RegisterBody,
    ServeError,
    WorkerStatus,
    WorkerView,
    encode_frame,
)
from llava.serve.common.security import AddressRule
from llava.serve.common.streaming import StreamResponse
from llava.serve.control.registry import Entry, Registry
from llava.serve.control.worker_client import WorkerClient, WorkerStream

logger = logging.getLogger(__name__)


class Controller:
    """The registry and what is done about it; everything runs on one event loop and nothing blocks it."""

    def __init__(
        self, registry: Registry, client: WorkerClient, rule: AddressRule, *, sweep_seconds: float = 5.0
    ) -> None:
        self.registry = registry
        self.client = client
        self.rule = rule
        self.draining = False
        self.streams = 0
        self.metrics = Metrics()
        self.metrics.gauge("llava_workers", "Registered workers", lambda: len(registry))
        self.metrics.gauge("llava_streams", "Streams passed on now", lambda: self.streams)
        self._sweep_seconds = sweep_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._refreshed = -1e9

    def readiness(self) -> str:
        if self.draining:
            return "draining"
        return "" if self.registry.models() else "no worker is ready"

    async def register(self, body: RegisterBody) -> dict[str, bool]:
        """Believe a worker only when it answers at its own address (anchors.md §3.4, checks 3 and 4)."""
        address = self.rule.check(body.worker_name)
        if self.registry.full:
            raise ServeError(ErrorType.OVERLOADED, "The controller has as many workers as it takes.", retry_after=60)
        status = await self.client.probe(address)
        if status is not None:
            self.registry.put(address, body.check_heart_beat, status, probed=True)
            return {"registered": True}
        if body.worker_status is None:
            raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker does not answer /worker_get_status.")
        # Workers of old register before they listen: wait for them to answer.
        self.registry.put(address, body.check_heart_beat, body.worker_status, probed=False)
        return {"registered": False}

    async def heart_beat(self, body: HeartBeatBody) -> bool:
        address = body.worker_name.removesuffix("/")
        known = self.registry.heart_beat(address, body.queue_length)
        for entry in self.registry.entries():
            if entry.address == address and not entry.probed:
                self.spawn(self._probe(entry))
        return known

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; the set keeps the task alive."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self, entry: Entry, *, drop: bool = False) -> None:
        """Ask a worker how it is. With `drop`, forget one that neither answers nor sends heartbeats."""
        status = await self.client.probe(entry.address)
        if status is not None:
            self.registry.update(entry, status)
        elif drop and not self.registry.is_fresh(entry):
            self.registry.remove(entry.address)

    async def refresh(self) -> None:
        """Query all workers together; one that is merely busy stays. At most once a second."""
        if time.monotonic() - self._refreshed < 1.0:
            return
        self._refreshed = time.monotonic()
        await asyncio.gather(*(self._probe(entry, drop=True) for entry in self.registry.entries()))

    async def watch(self) -> None:
        """Expire workers, and ask those that are not proven or send no heartbeats. Never ends by itself."""
        while True:
            await asyncio.sleep(self._sweep_seconds)
            try:
                for _ in self.registry.sweep():
                    logger.warning("A worker's heartbeats have stopped; it is no longer listed.")
                asked = [e for e in self.registry.entries() if not (e.probed and e.check_heart_beat)]
                await asyncio.gather(*(self._probe(entry) for entry in asked))
            except Exception:  # expiry must go on whatever happened (spec/serve.md §12, C3)
                logger.exception("The sweep of the workers failed")

    async def stream(self, body: GenerateBody, content: bytes, request_id: str) -> Response:
        """Pass a request on and its frames back; exactly one error frame when that fails."""
        upstream = await self.open(body.model, content, request_id)
        outcome = ["ok"]
        close = self.closer(upstream, outcome)
        return StreamResponse(self._relay(upstream, request_id, outcome), close, media_type=FRAME_MEDIA_TYPE)

    async def open(self, model: str, content: bytes, request_id: str) -> WorkerStream:
        """A stream at a worker, counted if it is refused."""
        try:
            if self.draining:
                raise ServeError(ErrorType.NOT_READY, "The controller is stopping; try again shortly.", retry_after=2)
            upstream = await self.client.open(model, content, request_id)
        except ServeError as error:
            self.metrics.requests.labels(error.kind.wire).inc()
            raise
        self.streams += 1
        return upstream

    def closer(self, upstream: WorkerStream, outcome: list[str]) -> Any:
        """What to call when the client's response has ended."""

        def close() -> None:
            self.streams -= 1
            self.metrics.requests.labels(outcome[0]).inc()
            self.spawn(upstream.aclose())

        return close

    @staticmethod
    async def _relay(upstream: WorkerStream, request_id: str, outcome: list[str]) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(upstream.frames()) as frames:
                async for frame in frames:
                    yield frame + b"\0"
        except ServeError as error:
            outcome[0] = error.kind.wire
            yield encode_frame(error.frame(request_id))
        except BaseException:
            outcome[0] = "cancelled"
            raise

    async def drain(self, grace: float) -> None:
        self.draining = True
        deadline = time.monotonic() + grace
        while self.streams and time.monotonic() < deadline:
            await asyncio.sleep(0.05)


def controller_routes(controller: Controller) -> FastAPI:
    """The application without its guard and without `/v1/`."""
    app = make_app("LLaVA controller", controller.metrics, controller.readiness)
    registry = controller.registry

    @app.post("/register_worker")
    async def register_worker(body: RegisterBody) -> dict[str, bool]:
        return await controller.register(body)

    @app.post("/unregister_worker")
    async def unregister_worker(body: NameBody) -> dict[str, bool]:
        return {"removed": registry.remove(body.worker_name.removesuffix("/"))}

    @app.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        await controller.refresh()

    @app.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": registry.models()}

    @app.post("/list_workers")
    async def list_workers() -> dict[str, list[WorkerView]]:
        return {"workers": registry.views()}

    @app.post("/get_worker_address")
    async def get_worker_address(body: AddressBody) -> dict[str, str]:
        return {"address": registry.pick(body.model)}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(body: HeartBeatBody) -> dict[str, bool]:
        return {"exist": await controller.heart_beat(body)}

    @app.post("/worker_get_status")
    async def worker_get_status() -> WorkerStatus:
        return registry.total()

    @app.post("/worker_generate_stream", response_class=Response)
    async def worker_generate_stream(body: GenerateBody, request: Request) -> Response:
        if not body.model:
            raise ServeError(ErrorType.BAD_REQUEST, "The request names no model; send one of /list_models.")
        content = await request.body()
        forget_body(request)
        return await controller.stream(body, content, request_id_of(request))

    return app


def with_lifespan(app: FastAPI, controller: Controller) -> FastAPI:
    """Run the sweep as long as the server."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.ensure_future(controller.watch())
        yield
        watcher.cancel()
        await controller.drain(0)
        await controller.client.aclose()

    app.router.lifespan_context = lifespan
    return app
