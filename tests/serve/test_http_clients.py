"""HTTP as other clients and libraries speak it: upgrades, old versions, bodies, other origins, proxies."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import httpx
import pytest
from fastapi import FastAPI

from llava.errors import ConfigError
from llava.serve import gradio_web_server as web
from llava.serve.common.arguments import LOGINS_VARIABLE
from llava.serve.common.middleware import CrossOrigin, check_origins
from llava.serve.common.server import server_config
from llava.serve.controller import ControllerArgs, build_parser
from tests.serve.fake_service import FakeService, web_server
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    Live,
    LiveController,
    LiveWorker,
    frames_of,
    live_controller,
    live_worker,
    post,
    request_body,
    until,
)

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA\r\n"
JSON = b"Content-Type: application/json\r\n"
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[LiveController, LiveWorker]]:
    with live_controller() as controller, live_worker(controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        yield controller, worker


def exchange(url: str, head: bytes, body: bytes = b"", version: bytes = b"1.1", then: bytes = b"") -> bytes:
    """All that the server sends in reply to raw bytes on one connection; `then` follows the first bytes received."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    start, _, fields = head.partition(b"\r\n")
    request = start + b" HTTP/" + version + b"\r\nHost: x\r\nConnection: close\r\n" + fields
    if b"Connection: Upgrade" in fields:
        request = request.replace(b"Connection: close\r\n", b"")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        sock.sendall(request + b"\r\n" + body)
        reply = b""
        while part := sock.recv(65_536):
            reply += part
            if then:
                sock.sendall(then)
                then = b""
            if b"Connection: Upgrade" in request and complete(reply):
                break  # the connection stays open
        return reply


def complete(reply: bytes) -> bool:
    head, _, body = reply.partition(b"\r\n\r\n")
    length = next((line[16:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), None)
    return body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length)


def posted(path: bytes, body: bytes, fields: bytes = JSON) -> tuple[bytes, bytes]:
    return b"POST " + path + b"\r\n" + fields + b"Content-Length: %d\r\n" % len(body), body


# --- upgrades and versions ------------------------------------------------------------------------------------------


def test_httptools_is_not_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httptools", ModuleType("httptools"))
    monkeypatch.delitem(sys.modules, "uvicorn.protocols.http.auto", raising=False)
    config = server_config(FastAPI())
    config.load()
    assert config.http_protocol_class.__name__ == "H11Protocol"


def test_a_client_that_offers_http2_is_answered(parts: tuple[LiveController, LiveWorker]) -> None:
    """As the JDK's HttpClient sends every request."""
    controller, worker = parts
    reply = exchange(controller.url, *posted(b"/v1/chat/completions", CHAT, JSON + H2C))
    assert reply.startswith(b"HTTP/1.1 200") and b"w0 w1" in reply
    body = json.dumps(request_body("hi", 2)).encode()
    for url in (controller.url, worker.url):
        reply = exchange(url, *posted(b"/worker_generate_stream", body, JSON + H2C))
        assert reply.startswith(b"HTTP/1.1 200") and b"w0 w1" in reply


@pytest.mark.slow
def test_the_page_answers_a_client_that_offers_http2(child_environment: dict[str, str]) -> None:
    environment = {**child_environment, LOGINS_VARIABLE: "ann:one"}
    with FakeService().serving() as service, web_server(service, environment) as url:
        form = b"Content-Type: application/x-www-form-urlencoded\r\n" + H2C
        reply = exchange(url, *posted(b"/login", b"username=ann&password=one", form))
        assert reply.startswith(b"HTTP/1.1 200") and b"set-cookie" in reply.lower()
        head = httpx.head(f"{url}/health", trust_env=False)
        assert head.status_code == 200 and "default-src 'self'" in head.headers["content-security-policy"]


def test_old_clients_and_expectations(parts: tuple[LiveController, LiveWorker]) -> None:
    controller, _ = parts
    path = b"/v1/chat/completions"
    old = exchange(controller.url, *posted(path, CHAT), version=b"1.0")
    assert b" 200 OK" in old[:20] and b"w0 w1" in old
    head, body = posted(path, CHAT, JSON + b"Expect: 100-continue\r\n")
    asked = exchange(controller.url, head, then=body)  # curl sends larger bodies so
    assert asked.startswith(b"HTTP/1.1 100") and b"HTTP/1.1 200" in asked
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(CHAT[i : i + 7]), CHAT[i : i + 7]) for i in range(0, len(CHAT), 7))
    chunked = exchange(
        controller.url, b"POST " + path + b"\r\n" + JSON + b"Transfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n"
    )
    assert chunked.startswith(b"HTTP/1.1 200") and b"w0 w1" in chunked
    assert exchange(controller.url, b"PRI *", b"SM\r\n\r\n", b"2.0").startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models"])
def test_head_is_answered_like_get(path: str, parts: tuple[LiveController, LiveWorker]) -> None:
    reply = httpx.head(parts[0].url + path, trust_env=False)
    assert reply.status_code == 200 and reply.content == b"" and int(reply.headers["content-length"]) > 0


def test_a_trailing_slash_is_ignored_below_v1(parts: tuple[LiveController, LiveWorker]) -> None:
    controller, _ = parts
    listed = httpx.get(f"{controller.url}/v1/models/", trust_env=False).json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    reply = httpx.post(f"{controller.url}/v1/chat/completions/", content=CHAT, headers=TYPED, trust_env=False)
    assert reply.status_code == 200  # not a redirect, which drops the body and breaks behind a TLS proxy


# --- bodies ---------------------------------------------------------------------------------------------------------

TYPED = {"Content-Type": "application/json"}
ZIPPED = {**TYPED, "Content-Encoding": "gzip"}
CHAT_PATH = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "words"),
    [
        (CHAT.replace(b"hi", b"caf\xe9"), TYPED, 400, "bad_request", "not encoded in UTF-8"),
        (b'{"model":' + b"[" * 100_000, TYPED, 400, "bad_request", "nested too deeply"),
        (gzip.compress(CHAT, mtime=0), ZIPPED, 415, "unsupported_encoding", "Compressed bodies are not supported"),
        (CHAT, {**TYPED, "Content-Encoding": "br"}, 415, "unsupported_encoding", "Compressed bodies"),
        (b"", TYPED, 400, "bad_request", "it is empty"),
        (b"", {}, 400, "bad_request", "it is empty"),
        (CHAT[:-1], TYPED, 400, "bad_request", f"not valid JSON at character {len(CHAT) - 1}"),
        (CHAT, {"Content-Type": "text/plain"}, 400, "bad_request", "the Content-Type is another one"),
        (CHAT.replace(b": 2", b": NaN"), TYPED, 400, "bad_request", "max_tokens"),
        (CHAT.replace(b'"hi"', b'"\\ud800"'), TYPED, 400, "bad_request", "a valid string"),
    ],
)
def test_a_body_that_cannot_be_read_is_one_sentence_with_a_code(
    body: bytes, headers: dict[str, str], status: int, code: str, words: str, parts: tuple[LiveController, LiveWorker]
) -> None:
    reply = httpx.post(parts[0].url + CHAT_PATH, content=body, headers=headers, trust_env=False, timeout=PATIENCE)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert words in error["message"] and "caf" not in error["message"]
    for part in parts:
        reply = httpx.post(
            f"{part.url}/worker_generate_stream", content=body, headers=headers, trust_env=False, timeout=PATIENCE
        )
        (frame,) = frames_of(reply)
        assert reply.status_code in (status, 422) and frame["error"]["type"] == code


@pytest.mark.parametrize(
    "body", [b"\xef\xbb\xbf" + CHAT, CHAT.decode().encode("utf-16"), CHAT[:-1] + b', "max_tokens": 1}']
)
def test_a_body_of_another_tool_is_read(body: bytes, parts: tuple[LiveController, LiveWorker]) -> None:
    """With a byte order mark, as PowerShell writes it; in UTF-16; with a key that is repeated (the last counts)."""
    headers = {**TYPED, "Content-Encoding": "identity"}
    reply = httpx.post(parts[0].url + CHAT_PATH, content=body, headers=headers, trust_env=False, timeout=PATIENCE)
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"].startswith("w0")


# --- other origins --------------------------------------------------------------------------------------------------


def preflight(url: str, origin: str, path: str = CHAT_PATH) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(url + path, headers={"Origin": origin, **asked}, trust_env=False)


@pytest.mark.parametrize(
    ("origins", "allowed"), [(["https://app.example.org"], "https://app.example.org"), (["*"], "*")]
)
def test_scripts_of_an_allowed_origin_can_use_the_api(origins: list[str], allowed: str) -> None:
    with live_controller(api_keys=["k"], origins=origins) as controller, live_worker(controller=controller.url):
        until(lambda: controller.registry.models() == [MODEL])
        ok = preflight(controller.url, "https://app.example.org")  # has no key
        assert ok.status_code == 200 and ok.headers["access-control-allow-origin"] == allowed
        assert "authorization" in ok.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in ok.headers
        origin = {"Origin": "https://app.example.org"}
        for key, status in (("k", 200), ("wrong", 401)):  # a script can read why it was refused
            headers = {**origin, **TYPED, "Authorization": f"Bearer {key}"}
            reply = httpx.post(controller.url + CHAT_PATH, content=CHAT, headers=headers, trust_env=False)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, allowed)
        if allowed != "*":
            assert "access-control-allow-origin" not in preflight(controller.url, "https://evil.example").headers
        assert preflight(controller.url, "https://app.example.org", "/register_worker").status_code == 405


def test_no_other_origin_is_allowed_by_default(parts: tuple[LiveController, LiveWorker]) -> None:
    assert ControllerArgs().allowed_origins == ()
    reply = preflight(parts[0].url, "https://app.example.org")
    assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers


def test_origins_are_checked() -> None:
    args = build_parser().parse_args(["--allowed-origins", "https://a.example", "http://localhost:3000"])
    assert check_origins(args.allowed_origins) == ["https://a.example", "http://localhost:3000"]
    assert check_origins(['["*"]']) == ["*"]  # as vLLM takes it
    for wrong in ("a.example", "https://a.example/", "https://a.example/chat"):
        with pytest.raises(ConfigError, match="--allowed-origins must be"):
            check_origins([wrong])
    assert CrossOrigin(FastAPI(), ["*"]).api.allow_all_origins


# --- proxies --------------------------------------------------------------------------------------------------------


def web_error(environment: dict[str, str], **proxies: str) -> str:
    command = [sys.executable, "-m", "llava.serve.gradio_web_server", "--port", "70000"]
    done = subprocess.run(command, env={**environment, **proxies}, capture_output=True, text=True, timeout=300)
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("socks5h://127.0.0.1:9", "pip install 'httpx[socks]'"),
        ("socks://127.0.0.1:9", "http://, https:// or socks5://"),
    ],
)
def test_a_proxy_that_httpx_cannot_use_is_said(value: str, words: str, child_environment: dict[str, str]) -> None:
    error = web_error(child_environment, ALL_PROXY=value, all_proxy=value)
    assert words in error and "reinstall" not in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1


def test_traffic_on_this_machine_ignores_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with live_controller() as controller, live_worker(controller=controller.url):
        until(lambda: controller.registry.models() == [MODEL])
        assert web.get_model_list(controller.url) == [MODEL]
        assert post(controller.url, CHAT_PATH, json.loads(CHAT)).status_code == 200


def test_an_address_in_brackets_is_reached() -> None:
    app = FastAPI()
    app.add_api_route("/list_models", lambda: {"models": ["six"]}, methods=["POST"])
    app.add_api_route("/refresh_all_workers", lambda: None, methods=["POST"])
    live = Live(lambda port: app, host="::1").start()
    assert live.url.startswith("http://[::1]:") and web.get_model_list(live.url) == ["six"]
    live.stop()
