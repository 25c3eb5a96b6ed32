"""Serving checks 8–11, 21, 22 and 29: invalid requests on every route."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from llava.serve.common.middleware import Limits
from llava.serve.common.security import OPEN_PATHS
from llava.serve.worker.app import worker_routes
from llava.serve.worker.local_backend import BackendSettings
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    LiveController,
    LiveWorker,
    StubEngine,
    b64,
    frames_of,
    generate,
    get,
    live_controller,
    live_worker,
    png,
    post,
    request_body,
    until,
)

HOSTILE = [
    b"[]",
    b'"x"',
    b"42",
    b"null",
    b"{",
    b"",
    b"not json",
    b"[" * 10_000,
    b'{"a":' * 10_000,
    b"\0",
    b'{"prompt": "\\ud800", "model": "\\ud800", "worker_name": "\\udfff"}',
    b'{"prompt": "a\\u0000b", "temperature": NaN, "model": Infinity}',
    b"\xff\xfe\xfa",
    json.dumps({"model": {"$ne": 1}, "prompt": ["x"], "messages": 7, "worker_name": 1e999}).encode(),
]
Part = LiveController | LiveWorker
TYPES = ("application/json", "text/plain", "application/x-www-form-urlencoded", "")


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[LiveController, LiveWorker]]:
    with live_controller() as controller, live_worker(StubEngine(context=500), controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        yield controller, worker


def routes_of(url: str, token: str = "") -> list[tuple[str, str]]:
    """(method, path) of every documented route."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    paths = get(url, "/openapi.json", headers=headers).json()["paths"]
    return [(method.upper(), path.replace("{name}", "x")) for path, item in paths.items() for method in item]


def test_check_08_no_body_makes_a_500_on_any_post_route(parts: tuple[LiveController, LiveWorker]) -> None:
    tried = 0
    for part in parts:
        posts = [path for method, path in routes_of(part.url) if method == "POST"]
        assert len(posts) >= 2
        with httpx.Client(base_url=part.url, timeout=PATIENCE, trust_env=False) as client:
            for path in posts:
                takes_body = path not in ("/list_models", "/list_workers", "/refresh_all_workers", "/worker_get_status")
                for body in HOSTILE:
                    for kind in TYPES if body == HOSTILE[0] else TYPES[:1]:
                        reply = client.post(path, content=body, headers={"Content-Type": kind})
                        tried += 1
                        assert reply.status_code in ((400, 415, 422) if takes_body else (200,)), (path, body[:40])
                        assert not takes_body or "detail" in reply.text or "error" in reply.text
    assert tried > 100


def test_check_08_a_refusal_names_the_field_or_what_a_body_has_to_be(
    parts: tuple[LiveController, LiveWorker],
) -> None:
    def error(body: bytes, kind: str = "application/json") -> dict[str, Any]:
        url = f"{parts[0].url}/v1/chat/completions"
        reply = httpx.post(url, content=body, headers={"Content-Type": kind}, timeout=PATIENCE, trust_env=False)
        assert reply.status_code == 400
        return dict(reply.json()["error"])

    for body, kind in ((b"{", "application/json"), (b"[]", "application/json"), (b"{}", "")):
        assert "must be a JSON object, sent with Content-Type: application/json" in error(body, kind)["message"]
    assert error(b'{"\\ud800": 1}')["param"] == "?"
    assert error(b'{"model": "stub", "messages": [], "top_p": 1}')["param"] == "messages"


RANGES: list[dict[str, Any]] = [
    {"temperature": -1},
    {"temperature": 1e9},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_p": 2},
    {"max_new_tokens": 0},
    {"max_new_tokens": -1},
    {"max_new_tokens": 10**12},
    {"max_new_tokens": "a"},
    {"max_new_tokens": 1.5},
    {"stop": ["x"] * 10_000},
    {"stop": [1]},
    {"stop": "x" * 1000},
    {"seed": -1},
    {"seed": 2**64},
]


@pytest.mark.parametrize("bad", RANGES, ids=lambda bad: str(bad)[:40])
def test_check_09_parameters_out_of_range_are_refused(
    parts: tuple[LiveController, LiveWorker], bad: dict[str, Any]
) -> None:
    for part in parts:
        reply = generate(part.url, {**request_body(), **bad})
        assert reply.status_code == 400
        (frame,) = frames_of(reply)
        assert frame["error"]["type"] == "bad_request"
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    bad = {"max_tokens" if key == "max_new_tokens" else key: value for key, value in bad.items()}
    reply = post(parts[0].url, "/v1/chat/completions", {**chat, **bad})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_check_09_nan_missing_and_null(parts: tuple[LiveController, LiveWorker]) -> None:
    controller, worker = parts
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=PATIENCE, trust_env=False, headers=headers) as client:
        nan = client.post(f"{worker.url}/worker_generate_stream", content=b'{"prompt": "x", "temperature": NaN}')
    assert nan.status_code == 400
    assert generate(worker.url, {"model": MODEL}).status_code == 422
    assert generate(controller.url, {"prompt": "x"}).status_code == 400
    for stop in (None, "", [], [""], ["", "zzz"]):
        frames = frames_of(generate(worker.url, request_body(tokens=2, stop=stop)))
        assert frames[-1]["text"] == "hellow0 w1 ", stop


def test_check_09_the_cap_on_answers_holds() -> None:
    with live_worker(StubEngine(), BackendSettings(max_new_tokens=5)) as worker:
        frames = frames_of(generate(worker.url, request_body(tokens=4096)))
    assert frames[-1]["usage"]["completion_tokens"] == 5
    assert frames[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("tags", [0, 1, 2])
def test_check_10_as_many_images_as_placeholders(
    parts: tuple[LiveController, LiveWorker], images: int, tags: int
) -> None:
    controller, worker = parts
    body = request_body("<image> " * tags, images=[b64(png())] * images)
    for url in (worker.url, controller.url):
        reply = generate(url, body)
        if images == tags:
            assert frames_of(reply)[-1]["finish_reason"] == "length"
            continue
        assert reply.status_code == 400
        error = frames_of(reply)[0]["error"]
        assert (error["type"], error["placeholders"], error["images"]) == ("image_count_mismatch", tags, images)


def test_check_10_a_placeholder_typed_by_a_user_of_the_api(parts: tuple[LiveController, LiveWorker]) -> None:
    controller, _ = parts
    text = {"type": "text", "text": "what is <image>?"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(png())}}
    for content, expected in (("what is <image>?", 400), ([text, image], 200), ([text, image, image], 400)):
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        assert post(controller.url, "/v1/chat/completions", body).status_code == expected


def test_check_11_too_long_is_an_error_with_counts(parts: tuple[LiveController, LiveWorker]) -> None:
    controller, worker = parts
    for url in (worker.url, controller.url):
        reply = generate(url, request_body("x" * 600))
        assert reply.status_code == 400
        (frame,) = frames_of(reply)
        assert frame["finish_reason"] == "context_exceeded"
        assert frame["error"]["type"] == "context_length_exceeded"
        assert (frame["error"]["prompt_tokens"], frame["error"]["context_length"]) == (600, 500)
        assert frames_of(generate(url, request_body("x" * 400)))[-1]["error_code"] == 0


CREDENTIALS = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer SECRET-TOKEN"},
    {"Authorization": "Bearer"},
    {"Authorization": ""},
    {"Authorization": "Basic c2VjcmV0LXRva2Vu"},
    {"Authorization": "secret-token"},
    {"Authorization": b"Bearer cl\xe9"},
    {"Authorization": "Bearer secret-tokenx"},
    {"X-Api-Key": "secret-token"},
]


def test_check_21_every_route_but_two_needs_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with (
        live_controller(token="secret-token", api_keys=["user-key"]) as controller,
        live_worker(token="secret-token") as worker,
    ):
        for part in (controller, worker):
            routes = routes_of(part.url, "secret-token")
            assert len(routes) >= 5
            routes += [("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/nothing"), ("OPTIONS", "/list_models")]
            routes += [("POST", "/worker_get_status/"), ("GET", "/health/../metrics")]
            with httpx.Client(base_url=part.url, timeout=PATIENCE, trust_env=False) as client:
                for method, path in routes:
                    for headers in CREDENTIALS:
                        reply = client.request(method, path, headers=headers)
                        expected = {200, 503} if path in OPEN_PATHS else {401}
                        assert reply.status_code in expected, (method, path, headers)
                        assert "secret" not in reply.text
        right = {"Authorization": "bearer secret-token"}
        assert post(controller.url, "/list_models", headers=right).status_code == 200
        for key, expected in (("user-key", 200), ("secret-token", 200), ("other", 401)):
            assert get(controller.url, "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == expected
        user = {"Authorization": "Bearer user-key"}
        assert post(controller.url, "/list_models", headers=user).status_code == 401
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("llava")]
    assert ours
    assert not any("secret" in line or "user-key" in line for line in ours)


def test_check_21_the_route_list_is_whole(parts: tuple[LiveController, LiveWorker]) -> None:
    """The fuzz and key tests discover every route of the applications."""
    app = worker_routes(parts[1].worker)
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    assert paths == {path for _, path in routes_of(parts[1].url)}


def whole(reply: bytes) -> bool:
    """Whether a response is complete, according to its Content-Length."""
    head, _, body = reply.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


def raw(url: str, data: bytes, then: bytes = b"") -> bytes:
    """The response to raw bytes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        sock.sendall(data)
        if then:
            time.sleep(0.01)
            sock.sendall(then)
        reply = b""
        while not whole(reply) and (part := sock.recv(65_536)):
            reply += part
        return reply


def test_check_22_bodies_are_limited_in_size_and_time() -> None:
    limits = Limits(max_body=10_000, max_small_body=1000, body_seconds=0.3)
    head = b"POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with live_worker(limits=limits) as worker, live_controller(limits=limits) as controller:
        for part in (worker, controller):
            reply = raw(part.url, head + b"Content-Length: 99999999999\r\n\r\n")
            assert reply.startswith(b"HTTP/1.1 413")
            chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
            chunked = raw(part.url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk, chunk)
            assert chunked.startswith(b"HTTP/1.1 413")
            assert b"body_too_large" in chunked
            slow = raw(part.url, head + b'Content-Length: 100\r\n\r\n{"prompt"')
            assert slow.startswith(b"HTTP/1.1 408")
            assert post(part.url, "/worker_get_status", "x" * 2000).status_code == 413
        assert generate(worker.url, request_body("x" * 9000, 1)).status_code == 200
        assert generate(worker.url, request_body("x" * 10_000, 1)).status_code == 413
        assert worker.in_use == 0


def large_texts() -> set[int]:
    """Ids of the texts larger than 1 MiB referenced by any object of this process."""
    held = (text for owner in gc.get_objects() for text in gc.get_referents(owner))
    return {id(text) for text in held if type(text) in (bytes, str) and len(text) > 2**20}


@pytest.mark.parametrize("route", ["/worker_generate_stream", "/v1/chat/completions"])
def test_check_22_a_body_is_let_go_once_it_was_handed_on(route: str) -> None:
    others = large_texts()  # of earlier tests
    image = png(2, 2) + bytes(2**20)  # what follows the end of a PNG file is ignored
    legacy = request_body("<image>", tokens=10**6, images=[b64(image)], stream_mode="delta")
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(image)}"}}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    body = chat if route.startswith("/v1") else legacy
    text = json.dumps(body).encode()
    engine = StubEngine(pause=0.01)
    with live_controller() as controller, live_worker(engine, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        with socket.create_connection(("127.0.0.1", controller.live.port), PATIENCE) as sock:
            head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
            sock.sendall(f"{head}\r\n\r\n".encode() + text)
            until(lambda: engine.running == 1)
            del body, chat, legacy, part, image, text
            until(lambda: large_texts() <= others, seconds=10)
        until(lambda: worker.in_use == 0)


def test_check_29_errors_leak_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = StubEngine()
    secret = "boom at 0x7f31 in /usr/lib/python3/secret.py: prompt was MY-PROMPT"
    with live_controller() as controller, live_worker(engine, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        replies = []
        for url in (worker.url, controller.url):
            engine.step_error = RuntimeError(secret)
            replies.append(generate(url, request_body("MY-PROMPT")))
            engine.submit_error = RuntimeError(secret)
            replies.append(generate(url, request_body("MY-PROMPT")))
            engine.submit_error = None
            replies.append(generate(url, request_body("MY-PROMPT <image>", images=[b64(png()[:45])])))
            replies.append(generate(url, {**request_body("MY-PROMPT"), "top_p": "MY-PROMPT"}))
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "MY-PROMPT"}]}
        engine.step_error = RuntimeError(secret)
        replies.append(post(controller.url, "/v1/chat/completions", chat))
        assert replies[-1].status_code == 500
    for reply in replies:
        answer = reply.text.replace('"MY-PROMPT"', "")  # a first frame repeats the prompt to its own sender
        for leak in ("0x7f31", "/usr/lib", "Traceback", "secret.py", "prompt was"):
            assert leak not in answer
        assert reply.headers["x-request-id"] in answer
    assert "secret.py" in caplog.text, "the log has it all"


def test_request_ids_are_kept_when_sane_and_replaced_when_not() -> None:
    with live_worker() as worker:
        assert get(worker.url, "/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        assert get(worker.url, "/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
