"""The routes of any worker: status and streams in front of a backend, with exact accounts of every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from llava.serve.common.metrics import Metrics
from llava.serve.common.middleware import Keys, Limits, forget_body, guard, make_app, request_id_of
from llava.serve.common.protocol import (
    FRAME_MEDIA_TYPE,
    ErrorType,
    GenerateBody,
    ServeError,
    WorkerStatus,
    encode_frame,
)
from llava.serve.common.streaming import StreamResponse
from llava.serve.worker.backend import Answer, Backend, Piece
from llava.serve.worker.heartbeat import HeartBeat

logger = logging.getLogger(__name__)


class Worker:
    """One backend under one model name."""

    def __init__(self, backend: Backend, model_name: str, *, stream_interval: int = 1) -> None:
        self.backend = backend
        self.model_name = model_name
        self.stream_interval = max(1, stream_interval)
        self.heart: HeartBeat | None = None
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None
        self.metrics = Metrics()
        self.metrics.gauge("llava_requests_running", "Requests in the batch", lambda: backend.running)
        self.metrics.gauge("llava_requests_in_use", "Requests running or waiting", lambda: backend.in_use)

    def status(self) -> WorkerStatus:
        state = "draining" if self.draining else self.backend.state
        return WorkerStatus(
            model_names=[self.model_name] if state == "ready" else [],
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

    def report(self) -> None:
        """Let the controller know soon."""
        if self.heart is not None:
            self.heart.nudge()

    def changed(self) -> None:
        """The backend's state changed. One that failed for good ends the process: a supervisor starts a new one."""
        self.report()
        if self.backend.state == "failed":
            self.on_failure()

    async def answer(self, body: GenerateBody, request_id: str) -> Response:
        """Admit, check, and stream."""
        try:
            if self.draining:
                raise ServeError(ErrorType.NOT_READY, "This worker is stopping; try again shortly.", retry_after=2)
            answer = await self.backend.open(body)
        except ServeError as error:
            self.metrics.requests.labels(error.kind.wire).inc()
            raise
        except Exception:
            self.metrics.requests.labels(ErrorType.INTERNAL.wire).inc()
            raise
        self.report()
        stream = Stream(self, body, answer, request_id)
        return StreamResponse(stream.frames(), stream.close, media_type=FRAME_MEDIA_TYPE)

    async def drain(self, grace: float) -> None:
        """Refuse what is new, leave the controller, and let running streams finish for `grace` seconds."""
        self.draining = True
        if self.heart is not None:
            await self.heart.stop()
        deadline = time.monotonic() + grace
        while self.backend.in_use and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self.backend.in_use:
            logger.warning("%d requests did not finish within the grace time.", self.backend.in_use)
        await self.backend.stop()


class Stream:
    """One answer as frames (spec/serve.md §5)."""

    def __init__(self, worker: Worker, body: GenerateBody, answer: Answer, request_id: str) -> None:
        self.worker = worker
        self.answer = answer
        self.request_id = request_id
        self.delta = body.stream_mode == "delta"
        self.text = "" if self.delta else body.prompt  # what the next frame carries
        self.outcome = "cancelled"  # until told otherwise
        self.started = time.monotonic()
        self.closed = False

    async def frames(self) -> AsyncGenerator[bytes, None]:
        pieces = 0
        try:
            async with contextlib.aclosing(self.answer.pieces):
                async for piece in self.answer.pieces:
                    if self.closed:  # Python 3.11's wait_for may lose a cancellation
                        return
                    self.text += piece.text
                    if piece.text:
                        pieces += 1
                        if pieces == 1:
                            self.worker.metrics.first_token.observe(time.monotonic() - self.started)
                    if piece.finish_reason is not None:
                        self._account(piece)
                        yield self._frame(finish_reason=piece.finish_reason, usage=piece.usage)
                        return
                    if not piece.text:
                        yield self._frame(**({} if piece.position is None else {"queue_position": piece.position}))
                    elif pieces % self.worker.stream_interval == 1 % self.worker.stream_interval:
                        yield self._frame()
        except ServeError as error:
            self.outcome = error.kind.wire
            yield encode_frame(error.frame(self.request_id))
        except Exception:  # the client is owed one last frame, whatever happened
            logger.exception("request_id=%s failed while streaming", self.request_id)
            self.outcome = ErrorType.INTERNAL.wire
            defect = ServeError(ErrorType.INTERNAL, "The worker failed on this request; its log has the details.")
            yield encode_frame(defect.frame(self.request_id))

    def _frame(self, **extra: Any) -> bytes:
        frame = encode_frame({"text": self.text, "error_code": 0, **extra})
        if self.delta:
            self.text = ""
        return frame

    def _account(self, piece: Piece) -> None:
        self.outcome = str(piece.finish_reason)
        for kind, count in piece.usage.items():
            self.worker.metrics.tokens.labels(kind.removesuffix("_tokens")).inc(count)

    def close(self) -> None:
        """However it ended: give the slot back and count the request."""
        if self.closed:
            return
        self.closed = True
        self.answer.close()
        self.worker.metrics.requests.labels(self.outcome).inc()
        self.worker.metrics.seconds.observe(time.monotonic() - self.started)
        self.worker.report()


def worker_routes(worker: Worker) -> FastAPI:
    """The application without its guard."""
    app = make_app("LLaVA model worker", worker.metrics, worker.readiness)

    @app.post("/worker_get_status")
    async def worker_get_status() -> WorkerStatus:
        return worker.status()

    @app.post("/worker_generate_stream", response_class=Response)
    async def worker_generate_stream(body: GenerateBody, request: Request) -> Response:
        forget_body(request)
        return await worker.answer(body, request_id_of(request))

    return app


def make_worker_app(worker: Worker, keys: Keys, limits: Limits) -> ASGIApp:
    """Routes, guard, and the start of the backend and of the heartbeats with the server."""
    app = worker_routes(worker)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await worker.backend.start(worker.changed)
        if worker.heart is not None:
            worker.heart.start()
        yield
        await worker.drain(0)

    app.router.lifespan_context = lifespan
    return guard(app, keys, limits, worker.metrics)
