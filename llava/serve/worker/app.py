"""Worker application: status and streams over a backend, registration, metrics and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from llava.serve.common.arguments import WorkerArgs
from llava.serve.common.middleware import (
    Keys,
    Limits,
    Metrics,
    RequestMiddleware,
    make_app,
    release_body,
    request_id_of,
)
from llava.serve.common.protocol import (
    FRAME_MEDIA_TYPE,
    DetokenizeBody,
    ErrorType,
    Frame,
    GenerateBody,
    ServeError,
    TokenizeBody,
    TokenLogprob,
    WorkerStatus,
    encode_frame,
)
from llava.serve.common.security import AddressRule
from llava.serve.common.server import port_of, serve
from llava.serve.common.streaming import StreamResponse
from llava.serve.worker.backend import Backend, Delta, Generation
from llava.serve.worker.heartbeat import HeartBeat
from llava.serve.worker.metrics import EngineCollector

logger = logging.getLogger(__name__)


class Worker:
    """One backend served under one model name, and its adapters under theirs.

    `stream_interval` is the number of deltas per frame.
    """

    def __init__(self, backend: Backend, model_name: str, *, stream_interval: int = 1) -> None:
        self.backend = backend
        self.model_name = model_name
        self.stream_interval = max(1, stream_interval)
        self.heartbeat: HeartBeat | None = None
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None
        self.metrics = Metrics()
        self.metrics.gauge("llava_requests_running", "Number of requests in the batch", lambda: backend.running)
        self.metrics.gauge(
            "llava_requests_waiting",
            "Number of requests waiting to be processed",
            lambda: max(0, backend.in_use - backend.running),
        )
        self.metrics.registry.register(EngineCollector(backend.statistics))
        self.metrics.gauge("llava_requests_in_use", "Number of requests running or waiting", lambda: backend.in_use)

    def status(self) -> WorkerStatus:
        state = "draining" if self.draining else self.backend.state
        adapters = self.backend.info.adapters if self.backend.info else []
        return WorkerStatus(
            model_names=[self.model_name, *(one.name for one in adapters)] if state == "ready" else [],
            speed=1.0,
            queue_length=self.backend.in_use,
            state=state,
            loading=[self.model_name] if state == "loading" else [],
            progress=self.backend.progress if state == "loading" else None,
            features=self.backend.features,
            info=self.backend.info,
        )

    def readiness(self) -> str:
        state = "draining" if self.draining else self.backend.state
        return "" if state == "ready" else state

    def notify_controller(self) -> None:
        """Send a heartbeat soon."""
        if self.heartbeat is not None:
            self.heartbeat.trigger()

    def on_state_change(self) -> None:
        """Report the backend's new state; a failed backend ends the process, for a supervisor to restart it."""
        self.notify_controller()
        if self.backend.state == "failed":
            self.on_failure()

    async def generate(self, body: GenerateBody, request_id: str) -> Response:
        """Admit a request and stream its answer."""
        try:
            if self.draining:
                raise ServeError(ErrorType.NOT_READY, "This worker is stopping; try again shortly.", retry_after=2)
            generation = await self.backend.open(body)
        except ServeError as error:
            self.metrics.requests.labels(error.kind.wire).inc()
            raise
        except Exception:
            self.metrics.requests.labels(ErrorType.INTERNAL.wire).inc()
            raise
        self.notify_controller()
        stream = FrameStream(self, body, generation, request_id)
        return StreamResponse(stream.frames(), stream.close, media_type=FRAME_MEDIA_TYPE)

    async def drain(self, grace: float) -> None:
        """Refuse new requests, unregister, and let running requests finish for `grace` seconds."""
        self.draining = True
        if self.heartbeat is not None:
            await self.heartbeat.stop()
        deadline = time.monotonic() + grace
        while self.backend.in_use and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self.backend.in_use:
            logger.warning("%d requests did not finish within %g seconds.", self.backend.in_use, grace)
        await self.backend.stop()


@dataclass
class _ChoiceFrames:
    """Content of the next frame of a choice, and the number of deltas with text so far."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    count: int = 0


class FrameStream:
    """Encodes one generation as frames: cumulative text with the prompt, or new text only in delta mode."""

    def __init__(self, worker: Worker, body: GenerateBody, generation: Generation, request_id: str) -> None:
        self.worker = worker
        self.generation = generation
        self.request_id = request_id
        self.delta = body.stream_mode == "delta"
        self.choices = [_ChoiceFrames("" if self.delta else body.prompt) for _ in range(body.n)]
        self.outcome = "cancelled"
        self.started = time.monotonic()
        self.closed = False

    async def frames(self) -> AsyncGenerator[bytes, None]:
        interval, waits_for_text, unfinished = self.worker.stream_interval, True, len(self.choices)
        try:
            async with contextlib.aclosing(self.generation.deltas):
                async for delta in self.generation.deltas:
                    if self.closed:  # Python 3.11's wait_for may lose a cancellation
                        return
                    choice = self.choices[delta.index]
                    choice.text += delta.text
                    choice.logprobs += delta.logprobs
                    if delta.text:
                        choice.count += 1
                        if waits_for_text:
                            self.worker.metrics.first_token.observe(time.monotonic() - self.started)
                        waits_for_text = False
                    if delta.finish_reason is not None:
                        self._count_tokens(delta)
                        yield self._frame(delta.index, {"finish_reason": delta.finish_reason, "usage": delta.usage})
                        unfinished -= 1
                        if not unfinished:
                            return
                    elif delta.text:
                        if choice.count % interval == 1 % interval:
                            yield self._frame(delta.index, {})
                    elif not delta.logprobs:
                        position = delta.queue_position
                        yield self._frame(delta.index, {} if position is None else {"queue_position": position})
        except ServeError as error:
            self.outcome = error.kind.wire
            yield encode_frame(error.frame(self.request_id))
        except Exception:  # any failure ends the stream with an error frame
            logger.exception("request_id=%s failed while streaming", self.request_id)
            self.outcome = ErrorType.INTERNAL.wire
            internal = ServeError(ErrorType.INTERNAL, "The worker failed on this request; see its log.")
            yield encode_frame(internal.frame(self.request_id))

    def _frame(self, index: int, extra: Frame) -> bytes:
        choice = self.choices[index]
        frame: Frame = {"text": choice.text, "error_code": 0, **extra}
        if len(self.choices) > 1:
            frame["index"] = index
        if choice.logprobs:
            frame["logprobs"] = choice.logprobs
        choice.text, choice.logprobs = "" if self.delta else choice.text, []
        return encode_frame(frame)

    def _count_tokens(self, last: Delta) -> None:
        self.outcome = str(last.finish_reason)
        for kind, count in last.usage.items():
            self.worker.metrics.tokens.labels(kind.removesuffix("_tokens")).inc(count)

    def close(self) -> None:
        """Release the slot and count the request; runs once, however the stream ended."""
        if self.closed:
            return
        self.closed = True
        self.generation.close()
        self.worker.metrics.requests.labels(self.outcome).inc()
        self.worker.metrics.seconds.observe(time.monotonic() - self.started)
        self.worker.notify_controller()


def worker_routes(worker: Worker) -> FastAPI:
    """Create the application, without its middleware."""
    app = make_app("LLaVA model worker", worker.metrics, worker.readiness)

    @app.post("/worker_get_status")
    async def worker_get_status() -> WorkerStatus:
        return worker.status()

    @app.post("/worker_generate_stream", response_class=Response)
    async def worker_generate_stream(body: GenerateBody, request: Request) -> Response:
        release_body(request)
        return await worker.generate(body, request_id_of(request))

    @app.post("/worker_tokenize")
    async def worker_tokenize(body: TokenizeBody) -> dict[str, object]:
        return await asyncio.to_thread(worker.backend.tokenize, body)

    @app.post("/worker_detokenize")
    async def worker_detokenize(body: DetokenizeBody) -> dict[str, object]:
        return await asyncio.to_thread(worker.backend.detokenize, body)

    return app


def make_worker_app(worker: Worker, keys: Keys, limits: Limits) -> ASGIApp:
    """Create the application with its middleware; backend and heartbeats start and stop with the server."""
    app = worker_routes(worker)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await worker.backend.start(worker.on_state_change)
        if worker.heartbeat is not None:
            worker.heartbeat.start()
        yield
        await worker.drain(0)

    app.router.lifespan_context = lifespan
    return RequestMiddleware(app, keys, limits, worker.metrics)


def run_worker(worker: Worker, sock: socket.socket, token: str | None, args: WorkerArgs) -> int:
    """Serve `worker` on `sock` until a signal stops it; returns the exit status, 1 when the backend failed."""
    address = AddressRule().check(args.worker_address or f"http://localhost:{port_of(sock)}")

    async def drain() -> None:
        await worker.drain(args.grace_seconds)

    if not args.no_register:
        worker.heartbeat = HeartBeat(args.controller_address, address, worker.status, token)
    serve(make_worker_app(worker, Keys.from_secrets(token), Limits(max_body=args.max_body)), sock, drain)
    return 1 if worker.backend.state == "failed" else 0
