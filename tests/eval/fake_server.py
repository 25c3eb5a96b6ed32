"""An OpenAI-compatible loopback server with scripted replies."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer:
    """Sends the (status, text) `replies` in order and repeats the last one, or calls `answer` with the request body."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, str]] | None = None) -> None:
        self.replies: list[tuple[int, str]] = [(200, "8 9\nfine")]
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.models = ["fake"]
        self.stream: str | None = None  # sent instead of every reply, as events
        self.message: dict[str, Any] | None = None  # of every reply
        self.body: Any = None  # sent instead of every reply
        self.headers: dict[str, str] = {}
        self.answer = answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def send(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode() if outer.stream is None else outer.stream.encode()
                self.send_response(status)
                kind = "application/json" if outer.stream is None else "text/event-stream; charset=utf-8"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                for header in outer.headers.items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.send(200, {"data": [{"id": name} for name in outer.models]})

            def do_POST(self) -> None:
                outer.paths.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                status, text = outer.reply(body)
                self.send(status, outer.body or {"choices": [{"message": outer.message or {"content": text}}]})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.message is not None:
            return 200, ""
        if self.answer is not None:
            return self.answer(body)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
