"""A Hugging Face hub on loopback that takes uploads: what `HfApi` needs to create a repository and commit to it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import reset_sessions

TOKEN: Final = "hf_write"
READ_ONLY: Final = "hf_read"
USER: Final = "me"


class Hub:
    """Repositories by name, each a dict of path -> content, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[str]]] = []  # repository, message, paths
        self.unknown: list[str] = []
        self.failures = 0  # commits to refuse
        self.gate = threading.Event()  # large files wait for it
        self.gate.set()
        self.waiting = threading.Event()

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{body.get('organization') or USER}/{body['name']}"
        known = name in self.repositories
        self.repositories.setdefault(name, {})
        if body.get("private"):
            self.private.add(name)
        return 409 if known else 200, {"url": f"{self.url}/{name}"}

    url = ""

    def preupload(self, body: dict[str, Any]) -> dict[str, Any]:
        large = (".safetensors", ".bin", ".pt", ".pth", ".png")
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in body["files"]
            ]
        }

    def batch(self, body: dict[str, Any]) -> dict[str, Any]:
        self.waiting.set()
        assert self.gate.wait(60)
        hrefs = ("upload", f"{self.url}/blobs/"), ("verify", f"{self.url}/verify/")
        objects = [
            {**o, "actions": {action: {"href": href + o["oid"]} for action, href in hrefs}} for o in body["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        if self.failures:
            self.failures -= 1
            return 403, {"error": "storage quota exceeded"}
        files, paths = self.repositories[name], []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            if line["key"] != "header":
                paths.append(value["path"])
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.commits.append((name, message, sorted(paths)))
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status >= 400:
                self.send_header("X-Error-Message", str(body.get("error", "")))
            self.end_headers()
            self.wfile.write(data)

        def read(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            name, _, rest = self.path.partition("?")[0].removeprefix("/api/models/").partition("/tree/")
            if rest and name in hub.repositories:
                files = hub.repositories[name].items()
                self.answer(200, [{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files])
            else:
                hub.unknown.append(f"GET {self.path}")
                self.answer(404, {"error": "not found"})

        def do_PUT(self) -> None:
            oid, data = self.path.removeprefix("/blobs/"), self.read()
            if hashlib.sha256(data).hexdigest() != oid:
                self.answer(400, {"error": "the content does not have this SHA-256"})
                return
            hub.blobs[oid] = data
            self.answer(200, {})

        def do_POST(self) -> None:
            data, path = self.read(), self.path.partition("?")[0]
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READ_ONLY):
                self.answer(401, {"error": "Invalid username or password."})
            elif path == "/api/repos/create":
                self.answer(*hub.create(json.loads(data)))
            elif token == READ_ONLY:
                self.answer(403, {"error": "Forbidden: you need write access"})
            elif path == "/api/validate-yaml":
                ModelCard(json.loads(data)["content"])
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                self.answer(200, hub.preupload(json.loads(data)))
            elif path.endswith("/info/lfs/objects/batch"):
                self.answer(200, hub.batch(json.loads(data)))
            elif path.startswith("/verify/"):
                asked = json.loads(data)
                known = len(hub.blobs.get(asked["oid"], b"")) == asked["size"]
                self.answer(200 if known else 404, {"error": "not uploaded"})
            elif "/commit/" in path:
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                self.answer(*hub.commit(name, [json.loads(line) for line in data.splitlines() if line]))
            else:
                hub.unknown.append(f"POST {path}")
                self.answer(404, {"error": "not found"})

    return Handler


@contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the hub, with a token that can write to it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.setenv(name, "0")
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1")
    reset_sessions()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
        reset_sessions()
        assert hub.unknown == []
