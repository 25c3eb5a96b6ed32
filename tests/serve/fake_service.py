"""A controller and its workers in one thread, with configurable answers and delays."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llava.serve.common.server import bind_socket, port_of
from tests.serve.stubs import until


@dataclass
class FakeService:
    """Served models, answers and recorded calls. An answer is a list of frames, or of words that become frames."""

    models: list[str] = field(default_factory=lambda: ["alpha"])
    answers: dict[str, list[Any]] = field(default_factory=dict)
    statuses: dict[str, Any] = field(default_factory=dict)  # per model: worker_get_status, or None for a 500
    workers: list[dict[str, Any]] | None = None  # /list_workers; None: as an old controller, 404
    http: dict[str, tuple[int, Any]] = field(default_factory=dict)  # per path: answer this status and body
    delay: float = 0.0  # seconds between frames
    silence: float = 0.0  # seconds before the first frame
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    running: int = 0
    broken_off: int = 0  # streams whose reader left early
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/{path:path}", self._answer, methods=["POST"])
        return app

    async def _answer(self, path: str, request: Request) -> Response:
        path = "/" + path
        self.calls.append(path)
        self.headers.append(dict(request.headers))
        body = json.loads(await request.body() or b"null")
        if path in self.http:
            status, content = self.http[path]
            return content if isinstance(content, Response) else JSONResponse(content, status)
        if path == "/refresh_all_workers":
            return JSONResponse(None)
        if path == "/list_models":
            return JSONResponse({"models": self.models})
        if path == "/list_workers" and self.workers is not None:
            return JSONResponse({"workers": self.workers})
        if path == "/get_worker_address":
            return JSONResponse({"address": f"{self.url}/of/{body['model']}" if body["model"] in self.models else ""})
        model, _, verb = path.removeprefix("/of/").partition("/")
        if path.startswith("/of/") and verb == "worker_get_status":
            status = self.statuses.get(model, {"model_names": [model], "speed": 1, "queue_length": 0})
            return Response(status_code=500) if status is None else JSONResponse(status)
        if path.startswith("/of/") and verb == "worker_generate_stream":
            self.requests.append(body)
            return StreamingResponse(self._stream(body), media_type="application/octet-stream")
        return JSONResponse({"detail": "Not Found"}, 404)

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        done = False
        try:
            await asyncio.sleep(self.silence)
            text = body["prompt"]
            for part in self.answers.get(body["model"], ["A ", "red ", "circle."]):
                if part == "break":
                    raise ConnectionResetError
                if isinstance(part, bytes):
                    yield part
                elif isinstance(part, dict):
                    yield json.dumps(part).encode() + b"\0"
                else:
                    text = part if body.get("stream_mode") == "delta" else text + part
                    yield json.dumps({"text": text, "error_code": 0}).encode() + b"\0"
                await asyncio.sleep(self.delay)
            done = True
        finally:
            self.running -= 1
            self.broken_off += not done

    @contextmanager
    def serving(self) -> Iterator[FakeService]:
        """Run it on a free loopback port."""
        sock = bind_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{port_of(sock)}"
        server = uvicorn.Server(uvicorn.Config(self.app(), log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(10)
            sock.close()


@contextmanager
def web_server(service: FakeService, environment: dict[str, str], *flags: str) -> Iterator[str]:
    """Run a web server in a child process; yields its URL and checks that it exits cleanly."""
    command = [sys.executable, "-m", "llava.serve.gradio_web_server", "--controller", service.url, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model-list-mode", "reload", *flags], stderr=subprocess.PIPE, text=True, env=environment
    )
    errors = process.stderr
    assert errors is not None
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(errors), daemon=True)
    reader.start()
    try:
        found = until(lambda: process.poll() or re.search(r"Listening on (\S+)", "".join(seen)), seconds=120)
        assert isinstance(found, re.Match), "".join(seen)
        yield found[1]
    finally:
        process.terminate()
        status = process.wait(60)
        reader.join(10)
        errors.close()
    assert status == 0, "".join(seen)
    assert "Traceback" not in "".join(seen), "".join(seen)
