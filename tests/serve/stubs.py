"""Stub engine with a step counter and a gate, and servers in threads of this process, on real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from PIL import Image

from llava.engine.sequence import Completion, Request, RequestHandle
from llava.engine.statistics import Statistics
from llava.errors import ContextLengthError
from llava.serve.common.middleware import CrossOrigin, Keys, Limits, RequestMiddleware
from llava.serve.common.protocol import FrameReader, ModelInfo
from llava.serve.common.security import AddressRule, ApiKeys
from llava.serve.common.server import bind_socket, port_of, server_config
from llava.serve.control.app import ControllerService, controller_routes, with_lifespan
from llava.serve.control.openai_api import OpenAIServing, add_api_routes
from llava.serve.control.registry import Registry
from llava.serve.control.worker_client import Timeouts, WorkerClient
from llava.serve.worker.app import Worker, make_worker_app
from llava.serve.worker.heartbeat import HeartBeat
from llava.serve.worker.local_backend import BackendSettings, LoadedModel, LocalBackend

MODEL = "stub"
PATIENCE = 60.0
TLS = ssl.create_default_context()  # costly to make, and never used
SETTINGS, LIMITS, TIMEOUTS = BackendSettings(max_new_tokens=1_000_000), Limits(), Timeouts()


@dataclass(eq=False)
class StubJob:
    handle: RequestHandle
    request: Request
    steps: int = 0


class StubEngine:
    """Engine that generates "w0 w1 …", one word per step up to `max_new_tokens`; a prompt token is a character."""

    def __init__(self, batch: int = 4, pause: float = 0.0, context: int = 100_000) -> None:
        self.batch, self.pause, self.context = batch, pause, context
        self.waiting: list[StubJob] = []
        self.jobs: list[StubJob] = []
        self.history: list[StubJob] = []
        self.gate = threading.Event()
        self.gate.set()
        self.step_error: Exception | None = None
        self.submit_error: Exception | None = None
        self.word: Callable[[int], str] = lambda k: f"w{k} "

    @property
    def running(self) -> int:
        return len(self.jobs)

    def statistics(self) -> Statistics:
        return Statistics(running=len(self.jobs), waiting=len(self.waiting), max_batch_size=self.batch)

    def submit(self, request: Request) -> RequestHandle:
        if self.submit_error is not None:
            raise self.submit_error
        length = len(request.prompt)
        if length >= self.context:
            raise ContextLengthError("too long", prompt_tokens=length, image_tokens=0, context_length=self.context)
        handle = RequestHandle(self.step, length)
        job = StubJob(handle, request)
        self.waiting.append(job)
        self.history.append(job)
        return handle

    def step(self) -> bool:
        for jobs in (self.waiting, self.jobs):
            for job in [job for job in jobs if job.handle.cancelled]:
                jobs.remove(job)
                self._finish(job, "cancelled")
        while self.waiting and len(self.jobs) < self.batch:
            self.jobs.append(self.waiting.pop(0))
        if self.jobs and self.step_error is not None:
            error, self.step_error = self.step_error, None
            raise error
        if self.jobs:
            self.gate.wait(PATIENCE)
            time.sleep(self.pause)
        for job in list(self.jobs):
            job.handle.push(self.word(job.steps))
            job.steps += 1
            if job.steps == job.request.params.max_new_tokens:
                self.jobs.remove(job)
                self._finish(job, "length")
        return bool(self.jobs or self.waiting)

    def abort(self, error: str) -> None:
        for job in [*self.jobs, *self.waiting]:
            self._finish(job, "error", error)
        self.jobs.clear()
        self.waiting.clear()

    def _finish(self, job: StubJob, reason: Any, error: str | None = None) -> None:
        text = "".join(map(self.word, range(job.steps)))
        job.handle.completion = Completion(text, tuple(range(job.steps)), reason, job.handle.prompt_tokens, error)


class Live:
    """ASGI application on a free port, in a thread with an event loop."""

    def __init__(self, make: Callable[[int], Any], host: str = "127.0.0.1") -> None:
        self._socket = bind_socket(host, 0)
        self.port = port_of(self._socket)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._make = make
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        config = server_config(self._make(self.port))
        config.timeout_graceful_shutdown = 1
        self.server = uvicorn.Server(config)
        self.server.run(sockets=[self._socket])

    def start(self) -> Live:
        self._thread.start()
        until(lambda: getattr(self, "server", None) is not None and self.server.started)
        return self

    def stop(self) -> None:
        """Safe to call twice."""
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Poll until `condition` returns a true value; returns it."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@dataclass
class LiveWorker:
    """A worker on a stub engine."""

    engine: StubEngine
    worker: Worker
    live: Live
    heart_to: str | None = None

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def in_use(self) -> int:
        return self.worker.backend.in_use

    def metric(self, name: str, **labels: str) -> float:
        return self.worker.metrics.registry.get_sample_value(name, labels) or 0.0

    def ready(self) -> LiveWorker:
        until(lambda: self.worker.backend.state == "ready")
        return self


INFO = ModelInfo(conv_template="vicuna_v1", context_length=100_000, image_tokens=16)


def make_worker(
    engine: StubEngine, settings: BackendSettings = SETTINGS, info: ModelInfo = INFO, **options: Any
) -> Worker:
    load = options.pop("load", lambda progress: LoadedModel(engine, info))
    return Worker(LocalBackend(load, settings), options.pop("name", MODEL), **options)


@contextlib.contextmanager
def live_worker(
    engine: StubEngine | None = None,
    settings: BackendSettings = SETTINGS,
    *,
    controller: str | None = None,
    token: str | None = None,
    limits: Limits = LIMITS,
    interval: float = 0.2,
    **options: Any,
) -> Iterator[LiveWorker]:
    engine = engine or StubEngine()
    worker = make_worker(engine, settings, **options)

    def make(port: int) -> Any:
        if controller is not None:
            address = f"http://127.0.0.1:{port}"
            beat = HeartBeat(controller, address, worker.status, token, interval=interval, max_delay=0.4)
            worker.heartbeat = beat
        return make_worker_app(worker, Keys(ApiKeys([token] if token else [])), limits)

    live = Live(make).start()
    try:
        yield LiveWorker(engine, worker, live).ready()
    finally:
        engine.gate.set()
        live.stop()


@dataclass
class LiveController:
    controller: ControllerService
    live: Live
    api: OpenAIServing

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def registry(self) -> Registry:
        return self.controller.registry

    def metric(self, name: str, **labels: str) -> float:
        return self.controller.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def live_controller(
    *,
    token: str | None = None,
    api_keys: list[str] | None = None,
    timeouts: Timeouts = TIMEOUTS,
    rule: AddressRule | None = None,
    limits: Limits = LIMITS,
    sweep: float = 0.2,
    expiration: float = 30.0,
    dispatch: Any = "shortest_queue",
    origins: list[str] | None = None,
    **api: Any,
) -> Iterator[LiveController]:
    made: dict[str, Any] = {}

    def make(_: int) -> Any:
        registry = Registry(dispatch, expiration=expiration)
        controller = ControllerService(
            registry, WorkerClient(registry, token, timeouts), rule or AddressRule(), check_interval=sweep
        )
        app = with_lifespan(controller_routes(controller), controller)
        made["controller"], made["api"] = controller, OpenAIServing(controller, **api)
        add_api_routes(app, made["api"])
        keys = Keys(ApiKeys([token] if token else []), ApiKeys(api_keys or []))
        guarded = RequestMiddleware(app, keys, limits, controller.metrics)
        return CrossOrigin(guarded, origins) if origins else guarded

    live = Live(make).start()
    try:
        yield LiveController(made["controller"], live, made["api"])
    finally:
        live.stop()


def request_body(prompt: str = "hello", tokens: int = 3, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_new_tokens": tokens, **more}


def frames_of(response: httpx.Response) -> list[dict[str, Any]]:
    reader = FrameReader()
    return [*reader.feed(response.content), *reader.close()]


def generate(url: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(
        f"{url}/worker_generate_stream", json=body, timeout=PATIENCE, trust_env=False, verify=TLS, **options
    )


def get(url: str, path: str, **options: Any) -> httpx.Response:
    return httpx.get(url + path, timeout=PATIENCE, trust_env=False, verify=TLS, **options)


def post(url: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=PATIENCE, trust_env=False, verify=TLS, **options)


def png(width: int = 20, height: int = 20, mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format=kind)
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class Decoy:
    """Server that counts connections and sends `reply`, or nothing when it is None."""

    reply: bytes | None = None
    hits: int = 0
    received: list[bytes] = field(default_factory=list)
    port: int = 0
    hold: bool = False  # keep the connection open after the reply
    drip: bytes = b""  # after the reply, this again and again

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits += 1
        try:
            self.received.append(await reader.readuntil(b"\r\n\r\n"))
            if self.reply is None:
                await reader.read()
            else:
                writer.write(self.reply)
                await writer.drain()
                while self.drip:
                    writer.write(self.drip)
                    await writer.drain()
                    await asyncio.sleep(0.02)
                if self.hold:
                    await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the caller has left, or the test has
        finally:
            writer.close()


@contextlib.contextmanager
def decoy(reply: bytes | None = None) -> Iterator[Decoy]:
    """Run a `Decoy` in a thread."""
    server = Decoy(reply)
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(server._serve, "127.0.0.1", 0)

    running = loop.run_until_complete(start())
    server.port = running.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def finish() -> None:
        running.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    try:
        yield server
    finally:
        work: Awaitable[None] = finish()
        asyncio.run_coroutine_threadsafe(work, loop).result(PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


def http_reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def status_reply(model: str = MODEL, **more: Any) -> bytes:
    body = {"model_names": [model], "speed": 1, "queue_length": 0, **more}
    return http_reply(json.dumps(body).encode(), "Content-Type: application/json")
