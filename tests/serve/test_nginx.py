"""docs/deployment/nginx.conf in nginx itself, in front of controller, worker and page: streams, limits, disconnects."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llava.engine.arguments import EngineArgs
from llava.serve.common.arguments import ServeArgs
from llava.serve.common.server import bind_socket, port_of
from llava.serve.gradio_web_server import _MAX_UPLOAD
from llava.serve.worker.local_backend import BackendSettings, model_loader
from tests.serve.fake_service import web_server
from tests.serve.gradio_client import Visitor
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    LiveController,
    LiveWorker,
    StubEngine,
    b64,
    decoy,
    live_controller,
    live_worker,
    png,
    until,
)

CONF = (Path(__file__).resolve().parents[2] / "docs" / "deployment" / "nginx.conf").read_text(encoding="utf-8")
MAIN = """
{user}
worker_processes 1;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


class Steps:
    """Gate of a `StubEngine` that lets single steps through."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self._open = False

    def allow(self, steps: int = 1) -> None:
        self._allowed.release(steps)

    def set(self) -> None:
        self._open = True
        self._allowed.release()

    def wait(self, seconds: float) -> None:
        if not self._open:
            assert self._allowed.acquire(timeout=seconds)
        if self._open:
            self._allowed.release()


def free_port() -> int:
    with bind_socket("127.0.0.1", 0) as sock:
        return port_of(sock)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate of localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", str(folder / "chat.key"), "-out", str(folder / "chat.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@contextmanager
def nginx(certificate: Path, folder: Path, api: str, page: str = "http://127.0.0.1:9", **changed: str) -> Iterator[str]:
    """nginx with the documented server, on a free port; `changed` are other values of directives. Yields its URL."""
    port = free_port()
    site = CONF
    changes = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "http://127.0.0.1:10000;": f"{api};",
        "http://127.0.0.1:7860;": f"{page};",
        "/etc/ssl/chat.pem;": f"{certificate}/chat.pem;",
        "/etc/ssl/chat.key;": f"{certificate}/chat.key;",
        **{re.search(rf"{name} \S+;", CONF)[0]: f"{name} {value};" for name, value in changed.items()},  # type: ignore[index]
    }
    for old, new in changes.items():
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site, encoding="utf-8")
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user), encoding="utf-8")
    log = (folder / "log").open("w")
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=log)

    def listens() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens)
        yield f"https://localhost:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE)
        log.close()


@contextmanager
def stack(engine: Any, **options: Any) -> Iterator[tuple[LiveController, LiveWorker]]:
    """A controller and a worker of `engine`, in threads."""
    with live_controller(**options) as controller, live_worker(engine, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        yield controller, worker


@pytest.fixture
def stepped() -> StubEngine:
    engine = StubEngine()
    engine.gate = Steps()  # type: ignore[assignment]
    return engine


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate / "chat.pem"))


def client(url: str, tls: ssl.SSLContext, address: str | None = None) -> httpx.Client:
    return httpx.Client(
        base_url=url, timeout=PATIENCE, transport=httpx.HTTPTransport(verify=tls, local_address=address)
    )


def test_streamed_tokens_arrive_one_by_one_and_a_disconnect_reaches_the_engine(
    stepped: StubEngine, certificate: Path, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    with stack(stepped) as (controller, worker), nginx(certificate, tmp_path, controller.url) as url:
        body = {**CHAT, "max_tokens": 100_000, "stream": True}
        with client(url, tls) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            for number in range(3):  # the engine waits after each token
                stepped.gate.allow()  # type: ignore[attr-defined]
                assert next(line for line in lines if f'"w{number}' in line)
            assert worker.in_use == 1
        stepped.gate.set()  # the client has left
        until(lambda: worker.in_use == 0)
        until(lambda: controller.metric("llava_requests_total", outcome="cancelled") == 1)


def test_events_of_the_page_are_not_held_back(certificate: Path, tls: ssl.SSLContext, tmp_path: Path) -> None:
    """An event smaller than nginx's buffers, of a server that, like Gradio, does not ask nginx not to buffer."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    with (
        decoy(head + b"data: 1\n\n") as page,
        nginx(certificate, tmp_path, "http://127.0.0.1:9", page.url) as url,
        client(url, tls) as http,
    ):
        page.hold = True
        with http.stream("GET", "/gradio_api/queue/data", timeout=10) as answer:
            assert next(answer.iter_lines()) == "data: 1"


def test_a_client_that_leaves_a_silent_answer_cancels_it(
    stepped: StubEngine, certificate: Path, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    with stack(stepped) as (controller, worker), nginx(certificate, tmp_path, controller.url) as url:
        with client(url, tls) as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 100_000}, timeout=0.5)
        stepped.gate.set()
        until(lambda: worker.in_use == 0)
        until(lambda: controller.metric("llava_requests_total", outcome="cancelled") == 1)


def test_the_error_of_a_large_body_is_the_controllers_up_to_its_limit(
    certificate: Path, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    limit = int(ServeArgs().max_body_mb)
    with (
        live_controller() as controller,
        nginx(certificate, tmp_path, controller.url) as url,
        client(url, tls) as http,
    ):
        ours = http.post("/v1/chat/completions", content=b" " * (limit * 2**20 + 1))
        assert (ours.status_code, ours.json()["error"]["code"]) == (413, "body_too_large")
        proxys = http.post("/v1/chat/completions", content=b" " * ((limit + 1) * 2**20 + 1))
        assert proxys.status_code == 413 and "nginx" in proxys.text


def test_silence_ends_an_answer_that_is_not_streamed_after_the_servers_own_limit_only(
    stepped: StubEngine, certificate: Path, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    """With one second in place of 930: the stream survives thanks to its keep-alive comments, the other does not."""
    seconds = int(re.search(r"proxy_read_timeout (\d+)s;", CONF)[1])  # type: ignore[index]
    assert seconds > BackendSettings().total_seconds
    body = {**CHAT, "max_tokens": 1}
    with (
        stack(stepped, keep_alive=0.2) as (controller, worker),
        nginx(certificate, tmp_path, controller.url, proxy_read_timeout="1s") as url,
        client(url, tls) as http,
        http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as streamed,
    ):
        assert http.post("/v1/chat/completions", json=body).status_code == 504
        lines = streamed.iter_lines()
        assert all(next(lines) is not None for _ in range(20))
        stepped.gate.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
        until(lambda: worker.in_use == 0)


def test_slow_headers_are_cut_off(certificate: Path, tls: ssl.SSLContext, tmp_path: Path) -> None:
    with nginx(certificate, tmp_path, "http://127.0.0.1:9", client_header_timeout="1s") as url:
        raw = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE)
        with tls.wrap_socket(raw, server_hostname="localhost") as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            assert slow.recv(100) == b""


def test_clients_are_told_apart_by_their_addresses(certificate: Path, tls: ssl.SSLContext, tmp_path: Path) -> None:
    """The rate limit counts the address that nginx saw, not one that the client claims."""
    body = {**CHAT, "max_tokens": 1}
    with stack(StubEngine(), rate_limit=1) as (controller, _), nginx(certificate, tmp_path, controller.url) as url:
        for address in ("127.0.0.2", "127.0.0.3"):
            with client(url, tls, address) as http:
                found = [
                    http.post("/v1/chat/completions", json=body, headers={"X-Forwarded-For": claim}).status_code
                    for claim in ("10.0.0.1", "10.0.0.2")
                ]
            assert found == [200, 429]


def test_openai_and_a_tiny_model_through_nginx(
    tiny_dirs: dict[str, Path], certificate: Path, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    load = model_loader(EngineArgs(str(tiny_dirs["chat"]), device="cpu"), MODEL, None, BackendSettings())
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(png())}}
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "What color?"}]}]
    with live_controller() as controller, live_worker(controller=controller.url, load=load):
        until(lambda: controller.registry.models() == [MODEL])
        with nginx(certificate, tmp_path, controller.url) as url:
            http = httpx.Client(verify=tls, timeout=PATIENCE)
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as api:
                ask: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12}
                whole = api.chat.completions.create(**ask)
                pieces = list(api.chat.completions.create(**ask, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content and text


@pytest.mark.slow
def test_the_page_streams_and_takes_files_and_hides_its_metrics(
    stepped: StubEngine, child_environment: dict[str, str], certificate: Path, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    with (
        stack(stepped) as (controller, worker),
        web_server(controller, child_environment) as page,
        nginx(certificate, tmp_path, controller.url, page) as url,
        client(url, tls) as http,
    ):
        visitor = Visitor(http, MODEL)
        assert visitor.config["root"].startswith(url), visitor.config["root"]
        visitor.send("hello")
        with visitor.events() as events:
            for number in range(3):
                stepped.gate.allow()  # type: ignore[attr-defined]
                assert next(event for event in events if f"w{number}" in json.dumps(event))
            assert worker.in_use == 1
        stepped.gate.set()
        until(lambda: worker.in_use == 0)  # the visitor has left
        files = {"files": ("large.bin", b"\0" * (40 * 2**20))}
        assert http.post("/gradio_api/upload", files=files).status_code == 200
        most = int(_MAX_UPLOAD.removesuffix("mb"))
        assert int(re.search(r"client_max_body_size (\d+)m;\s+# files", CONF)[1]) > most  # type: ignore[index]
        assert [http.get(path).status_code for path in ("/health", "/metrics")] == [200, 404]
        assert "llava_requests_total" in httpx.get(f"{page}/metrics", trust_env=False).text
        assert http.post("/register_worker", json={"worker_name": "http://x:1"}).status_code in (404, 405)
