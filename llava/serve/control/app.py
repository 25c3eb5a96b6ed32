"""Controller application: the worker registry over HTTP, background probes, and proxied streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

from fastapi import FastAPI, Request
from starlette.responses import Response

from llava.serve.common.middleware import Metrics, make_app, release_body, request_id_of
from llava.serve.common.protocol import (
    FRAME_MEDIA_TYPE,
    AddressBody,
    DetokenizeBody,
    ErrorType,
    GenerateBody,
    HeartBeatBody,
    NameBody,
    RegisterBody,
    ServeError,
    TokenizeBody,
    WorkerStatus,
    WorkerView,
    encode_frame,
)
from llava.serve.common.security import AddressRule
from llava.serve.common.streaming import StreamResponse
from llava.serve.control.registry import Registry, WorkerEntry
from llava.serve.control.worker_client import WorkerClient, WorkerStream

logger = logging.getLogger(__name__)


class ControllerService:
    """Registry, probes and proxied streams on one event loop, which is never blocked.

    `check_interval` is the number of seconds between two checks of the workers.
    """

    def __init__(
        self, registry: Registry, client: WorkerClient, rule: AddressRule, *, check_interval: float = 5.0
    ) -> None:
        self.registry = registry
        self.client = client
        self.rule = rule
        self.draining = False
        self._upstreams: set[WorkerStream] = set()
        self.metrics = Metrics()
        self.metrics.gauge("llava_workers", "Number of registered workers", lambda: len(registry))
        self.metrics.gauge("llava_streams", "Number of proxied streams in progress", lambda: self.streams)
        self._check_interval = check_interval
        self._tasks: set[asyncio.Task[None]] = set()
        self._refreshed = -1e9

    @property
    def streams(self) -> int:
        """Number of proxied streams in progress."""
        return len(self._upstreams)

    def readiness(self) -> str:
        if self.draining:
            return "draining"
        return "" if self.registry.models() else "no worker is ready"

    async def register(self, body: RegisterBody) -> dict[str, bool]:
        """Register a worker; its status is used only once it has answered at its own address.

        A worker that is not listening yet but sends its status is kept as unprobed.
        """
        address = self.rule.check(body.worker_name)
        if self.registry.full:
            raise ServeError(
                ErrorType.OVERLOADED, "The controller has reached its maximum number of workers.", retry_after=60
            )
        status = await self.client.probe(address)
        if status is not None:
            self.registry.put(address, body.check_heart_beat, status, probed=True)
            return {"registered": True}
        if body.worker_status is None:
            raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker does not respond to /worker_get_status.")
        self.registry.put(address, body.check_heart_beat, body.worker_status, probed=False)
        return {"registered": False}

    async def heart_beat(self, body: HeartBeatBody) -> bool:
        address = body.worker_name.removesuffix("/")
        known = self.registry.heart_beat(address, body.queue_length)
        for entry in self.registry.entries():
            if entry.address == address and not entry.probed:
                self.run_in_background(self._probe(entry))
        return known

    def run_in_background(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` as a task, referenced until it is done."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self, entry: WorkerEntry, *, drop: bool = False) -> None:
        """Query a worker's status. `drop` removes a worker that neither responds nor sends heartbeats."""
        status = await self.client.probe(entry.address)
        if status is not None:
            self.registry.update(entry, status)
        elif drop and not self.registry.is_fresh(entry):
            self.registry.remove(entry.address)

    async def refresh(self) -> None:
        """Query all workers concurrently, at most once per second; a busy worker with fresh heartbeats stays."""
        if time.monotonic() - self._refreshed < 1.0:
            return
        self._refreshed = time.monotonic()
        await asyncio.gather(*(self._probe(entry, drop=True) for entry in self.registry.entries()))

    async def monitor_workers(self) -> None:
        """Remove expired workers and probe those that are unprobed or send no heartbeats, until cancelled."""
        while True:
            await asyncio.sleep(self._check_interval)
            try:
                for _ in self.registry.remove_expired():
                    logger.warning("Removed a worker whose heartbeats have stopped.")
                entries = [e for e in self.registry.entries() if not (e.probed and e.check_heart_beat)]
                await asyncio.gather(*(self._probe(entry) for entry in entries))
            except Exception:  # a failed check must not end the expiry of workers
                logger.exception("The check of the workers failed")

    async def stream(self, body: GenerateBody, content: bytes, request_id: str) -> Response:
        """Proxy a request to a worker; a failure ends the stream with exactly one error frame."""
        upstream = await self.open(body.model, content, request_id)
        outcome = ["ok"]
        frames = self._relay(upstream, request_id, outcome)
        return StreamResponse(frames, self.close_callback(upstream, outcome), media_type=FRAME_MEDIA_TYPE)

    async def open(self, model: str, content: bytes, request_id: str) -> WorkerStream:
        """Open a stream at a worker; a refusal is counted."""
        try:
            self._refuse_if_draining()
            upstream = await self.client.open(model, content, request_id)
        except ServeError as error:
            self.metrics.requests.labels(error.kind.wire).inc()
            raise
        self._upstreams.add(upstream)
        return upstream

    async def call(self, path: str, model: str, content: bytes, request_id: str) -> Response:
        """Reply of a worker to a request without generation."""
        self._refuse_if_draining()
        stream = await self.client.open(model, content, request_id, path)
        return Response(await stream.body(), media_type="application/json")

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise ServeError(ErrorType.NOT_READY, "The controller is stopping; try again shortly.", retry_after=2)

    def close_callback(self, upstream: WorkerStream, outcome: list[str]) -> Callable[[], None]:
        """Function to call when the client's response has ended; it counts `outcome[0]`."""

        def close() -> None:
            self._upstreams.discard(upstream)
            self.metrics.requests.labels(outcome[0]).inc()
            self.run_in_background(upstream.aclose())

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
        """Refuse new requests, let running streams finish for `grace` seconds, and end the others with an error."""
        self.draining = True
        deadline = time.monotonic() + grace
        while self.streams and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.gather(*(stream.stop() for stream in self._upstreams))


def controller_routes(controller: ControllerService) -> FastAPI:
    """Create the application, without its middleware and without `/v1/`."""
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

    async def content_of(body: GenerateBody | TokenizeBody | DetokenizeBody, request: Request) -> bytes:
        if not body.model:
            raise ServeError(ErrorType.BAD_REQUEST, "`model` is missing; send one of /list_models.")
        content = await request.body()
        release_body(request)
        return content

    @app.post("/worker_generate_stream", response_class=Response)
    async def worker_generate_stream(body: GenerateBody, request: Request) -> Response:
        return await controller.stream(body, await content_of(body, request), request_id_of(request))

    @app.post("/worker_tokenize", response_class=Response)
    async def worker_tokenize(body: TokenizeBody, request: Request) -> Response:
        content = await content_of(body, request)
        return await controller.call("/worker_tokenize", body.model, content, request_id_of(request))

    @app.post("/worker_detokenize", response_class=Response)
    async def worker_detokenize(body: DetokenizeBody, request: Request) -> Response:
        content = await content_of(body, request)
        return await controller.call("/worker_detokenize", body.model, content, request_id_of(request))

    return app


def with_lifespan(app: FastAPI, controller: ControllerService) -> FastAPI:
    """Monitor the workers while the server runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        monitor = asyncio.ensure_future(controller.monitor_workers())
        yield
        monitor.cancel()
        await controller.drain(0)
        await controller.client.aclose()

    app.router.lifespan_context = lifespan
    return app
