"""The helper programs and the adapter to other engines, against running parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava.engine.sequence import Request, SamplingParams
from llava.serve import controller, model_worker, register_worker, test_message
from llava.serve.common.middleware import Keys, Limits
from llava.serve.common.protocol import ModelInfo
from llava.serve.worker import openai_backend
from llava.serve.worker.app import Worker, make_worker_app
from llava.serve.worker.local_backend import BackendSettings
from llava.serve.worker.openai_backend import OpenAIBackend
from llava.serve.worker.scheduler import Scheduler
from tests.serve.stubs import (
    MODEL,
    Live,
    StubEngine,
    b64,
    decoy,
    frames_of,
    generate,
    http_reply,
    live_controller,
    live_worker,
    png,
    post,
    request_body,
    until,
)

LONG = BackendSettings(max_new_tokens=100_000)
OLD = ModelInfo()
PROMPT = "Be kind. USER: <image>\nWhat? ASSISTANT:"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_TOKEN", raising=False)


def test_test_message_asks_and_shows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with live_controller() as controller, live_worker(controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        words = ["--controller", controller.url, "--max-new-tokens", "3"]
        assert test_message.main([*words, "--model-name", MODEL]) == 0
        assert test_message.main([*words, "--image", str(tmp_path / "a.png"), "--message", "hi"]) == 0
        assert test_message.main(["--worker", worker.url, "--max-new-tokens", "2"]) == 0
        out = capsys.readouterr().out
        assert "Models: stub" in out
        assert out.count("w0 w1 w2") == 2
        assert worker.engine.history[1].request.prompt.endswith("USER: <image>\nhi ASSISTANT:")
        worker.engine.step_error = RuntimeError("x")
        assert test_message.main(words) == 1


def test_test_message_reports_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with live_controller() as controller:
        assert test_message.main(["--controller", controller.url]) == 2
        assert "No worker serves" in capsys.readouterr().err
    assert test_message.main(["--controller", "http://127.0.0.1:9"]) == 2
    assert "Cannot reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        (controller, ["--port", "99999"], "--port must be between 1 and 65535, or 0 for any free port, got 99999"),
        (controller, ["--max-body-mb", "nan"], "expected a number greater than 0, got nan"),
        (controller, ["--rate-limit", "-3"], "expected a number greater than 0, got -3"),
        (controller, ["--port", "0", "--log-file", "c.log"], "Cannot write"),
        (model_worker, ["--max-images", "-1"], "--max-images must be at least 0, got -1"),
    ],
)
def test_invalid_arguments_are_reported_at_startup(
    module: Any, flags: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOGDIR", str(tmp_path / "file" / "logs"))
    status: Any
    try:
        status = module.main([*flags, *(["--model-path", "x"] if module is model_worker else [])])
    except SystemExit as refusal:  # by argparse
        status = refusal.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_a_worker_is_registered_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    with live_controller() as controller, live_worker() as worker:
        words = ["--controller", controller.url, "--worker-name"]
        assert register_worker.main([*words, worker.url]) == 0
        assert controller.registry.models() == [MODEL]
        assert register_worker.main([*words, "http://127.0.0.1:9"]) == 2
        assert "does not respond" in capsys.readouterr().err


def upstream_reply(*events: Any) -> bytes:
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    return http_reply("".join(lines).encode(), "Content-Type: text/event-stream")


@contextmanager
def adapter(upstream: str, **options: Any) -> Iterator[tuple[str, Worker]]:
    """A ready OpenAI worker over `upstream`."""
    made: list[Worker] = []

    def make(_: int) -> Any:
        info = ModelInfo(conv_template="vicuna_v1", max_new_tokens=64, max_images=4)
        made.append(Worker(OpenAIBackend(upstream, None, "key", info, **{"capacity": 4, **options}), "up"))
        return make_worker_app(made[0], Keys(), Limits())

    live = Live(make).start()
    try:
        until(lambda: made[0].backend.state == "ready")
        yield live.url, made[0]
    finally:
        live.stop()


def test_the_adapter_speaks_for_our_own_api_and_streams_the_same() -> None:
    with live_controller() as controller, live_worker(controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        with adapter(f"{controller.url}/v1") as (url, outer):
            frames = frames_of(generate(url, request_body(PROMPT, 3, images=[b64(png())], stop="</s>", seed=5)))
            assert frames[-1]["text"] == PROMPT + "w0 w1 w2 "
            assert frames[-1]["finish_reason"] == "length"
            assert frames[-1]["usage"]["completion_tokens"] == 3
            (job,) = worker.engine.history
            assert job.request.prompt == PROMPT
            assert [image.size for image in job.request.images] == [(20, 20)]  # type: ignore[union-attr]
            assert job.request.params.seed == 5
            until(lambda: outer.backend.in_use == 0)
            assert generate(url, request_body(PROMPT, 3)).status_code == 400
            assert generate(url, request_body("no template", 3)).status_code == 400
            for image in (png(kind="GIF"), png(kind="TIFF"), b"no image"):  # the engine gets the first as PNG
                status = 200 if image[:3] == b"GIF" else 400
                assert generate(url, request_body(PROMPT, 3, images=[b64(image)])).status_code == status
                until(lambda: outer.backend.in_use == 0)
            worker.engine.step_error = RuntimeError("x")
            assert frames_of(generate(url, request_body("USER: x ASSISTANT:")))[-1]["error"]["type"] == "internal"
            until(lambda: outer.backend.in_use == 0)


def test_a_client_that_leaves_the_adapter_stops_the_engine_behind_it() -> None:
    engine = StubEngine(pause=0.01)
    with live_controller() as controller, live_worker(engine, controller=controller.url, settings=LONG) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        with adapter(f"{controller.url}/v1") as (url, outer):
            outer.backend.info = ModelInfo(conv_template="vicuna_v1", max_new_tokens=100_000)
            body = request_body("USER: x ASSISTANT:", 100_000)
            with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=60) as response:
                next(response.iter_raw())
            until(lambda: worker.in_use == 0)
            until(lambda: outer.backend.in_use == 0)


def test_the_adapter_reports_what_its_engine_does_wrong() -> None:
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    chunk = {"choices": [{"delta": {"content": "hel"}, "finish_reason": None}]}
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, worker):
        for reply, kind in (
            (upstream_reply(chunk), "worker_unavailable"),
            (upstream_reply("{not json"), "worker_unavailable"),
            (upstream_reply(chunk, {"error": {"message": "no memory for key"}}), "internal"),
            (http_reply(b"busy", status="429 Too Many"), "overloaded"),
            (http_reply(b'{"error": "context length"}', status="400 Bad"), "context_length_exceeded"),
            (http_reply(b"no", status="400 Bad"), "bad_request"),
            (http_reply(b"secret", status="500 Oops"), "worker_unavailable"),
        ):
            engine.reply = reply
            answer = generate(url, request_body("USER: x ASSISTANT:"))
            assert frames_of(answer)[-1]["error"]["type"] == kind
            assert "secret" not in answer.text and "for key" not in answer.text
            assert kind != "internal" or "no memory for ***" in answer.text
            until(lambda: worker.backend.in_use == 0)
        assert b"Bearer key" in engine.received[-1]
        engine.reply = upstream_reply(chunk, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]")
        assert frames_of(generate(url, request_body("USER: x ASSISTANT:")))[-1]["text"].endswith("hel")
        worker.backend.capacity = 0  # type: ignore[attr-defined]
        assert generate(url, request_body("USER: x ASSISTANT:")).status_code == 503


SAID = {"choices": [{"delta": {"content": "hel"}, "finish_reason": None}]}


@pytest.mark.parametrize(
    "body",
    [
        f"data:{json.dumps(SAID)}\n\ndata:[DONE]\n\n",
        f"data: {json.dumps(SAID)}\n\ndata: " + '{"choices":[{"delta":null,"finish_reason":""}]}\n\ndata: [DONE]\n\n',
        ": wait\r\n\r\ndata: " + json.dumps(SAID).replace("null", '"eos"') + "\r\n\r\n",
        json.dumps({"choices": [{"message": {"content": "hel"}, "finish_reason": "stop"}]}),
        'data: {"choices":[{"delta":{"refusal":"hel"},"finish_reason":"stop"}]}',
    ],
    ids=["no space", "no reason to finish", "CRLF and eos", "not streamed", "refusal"],
)
def test_the_adapter_reads_every_form_of_an_answer(body: str) -> None:
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, _):
        engine.reply = http_reply(body.encode())
        frames = frames_of(generate(url, request_body("USER: x ASSISTANT:")))
        assert (frames[-1]["text"], frames[-1].get("finish_reason")) == ("USER: x ASSISTANT:hel", "stop")


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (http_reply(b'{"error":{"message":"top_k must be -1"}}', status="400 Bad"), "bad_request", "top_k must be -1"),
        (http_reply(b'{"detail":[{"loc":["body","n"],"msg":"bad"}]}', status="422 No"), "bad_request", "body.n: bad"),
        (http_reply(b'{"error":{"message":"odd","code":400}}'), "bad_request", "odd"),
        (http_reply(b"<html><title>502 Bad</title>secret</html>", status="502 Bad"), "worker_unavailable", "502"),
        (http_reply(b'{"error":{"message":"secret"}}', status="401 No"), "worker_unavailable", "key"),
        (http_reply(b'{"error":{"message":"later"}}', "Retry-After: 7", status="429 No"), "overloaded", "later"),
        (http_reply(b'{"message":"bad","code":"invalid_image_url"}', status="400 Bad"), "bad_image", "bad"),
        (http_reply(b'event: error\ndata: {"error":{"message":"odd","code":500}}\n\n'), "internal", "odd"),
        (upstream_reply({"choices": [{"delta": {}, "finish_reason": "abort"}]}), "internal", "aborted"),
        (upstream_reply({"choices": [{"delta": {}, "finish_reason": "content_filter"}]}), "bad_request", "filter"),
    ],
    ids=["400", "422", "200", "proxy", "401", "429", "image", "event", "abort", "filter"],
)
def test_reasons_of_the_engine_reach_the_client_and_the_log(
    reply: bytes, kind: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, worker):
        engine.reply = reply
        answer = generate(url, request_body("USER: x ASSISTANT:"))
        error = frames_of(answer)[-1]["error"]
        assert error["type"] == kind and words in error["message"] and "secret" not in error["message"]
        assert kind != "overloaded" or answer.headers["Retry-After"] == "7"
        logged = "secret" if "key" in words else words
        assert b"finish_reason" in reply or logged in caplog.text
        until(lambda: worker.backend.in_use == 0)


def test_an_overflow_of_the_engine_has_the_words_that_clients_know() -> None:
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    chat = {"model": "up", "messages": [{"role": "user", "content": "hi"}]}
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, worker), live_controller() as controller:
        controller.registry.put(url, False, worker.status(), probed=True)
        refusal = {"error": {"code": 400, "message": "the request exceeds the available context size", "n_ctx": 9}}
        engine.reply = http_reply(json.dumps(refusal).encode(), status="400 Bad")
        reply = post(controller.url, "/v1/chat/completions", chat)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
        assert "This model's maximum context length is exceeded." in error["message"]
        assert "the available context size" in error["message"] and "context_length_exceeded" in error["message"]


def test_the_adapter_omits_what_its_engine_refuses() -> None:
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, worker):
        backend = worker.backend
        assert isinstance(backend, OpenAIBackend)
        refuse = b'{"error":{"message":"%s is not supported"}}'
        for name in (b"stream_options", b"max_tokens"):
            engine.reply = http_reply(refuse % name, status="400 Bad")
            generate(url, request_body("USER: x ASSISTANT:"))
        request = backend._dialect.translate({"max_tokens": 3, "stream_options": {}})
        assert request == {"max_completion_tokens": 3}
        engine.reply = upstream_reply(SAID, "[DONE]")
        assert frames_of(generate(url, request_body("USER: x ASSISTANT:")))[-1]["finish_reason"] == "stop"


def test_silent_streams_get_comments_also_through_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_backend, "_KEEP_ALIVE", 0.05)
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 2}
    engine = StubEngine()
    with live_controller(keep_alive=0.05) as controller, live_worker(engine, controller=controller.url):
        until(lambda: controller.registry.models() == [MODEL])
        with adapter(f"{controller.url}/v1") as (url, _):
            engine.gate.clear()
            body = request_body("USER: x ASSISTANT:", 2)
            with (
                httpx.stream("POST", f"{controller.url}/v1/chat/completions", json=chat, timeout=60) as direct,
                httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=60) as adapted,
            ):
                events, frames = direct.iter_text(), adapted.iter_bytes()
                text, seen = "", b""
                while text.count(": keep-alive\n\n") < 2:
                    text += next(events)
                while seen.count(b"\0") < 2:
                    seen += next(frames)
                assert b"w0" not in seen and "w0" not in text
                engine.gate.set()
                assert "w1" in text + "".join(events)
                assert b"w1" in seen + b"".join(frames)


def test_an_engine_that_sends_headers_with_its_first_token_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_backend, "_KEEP_ALIVE", 0.05)
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, worker):
        engine.reply = None
        body = request_body("USER: x ASSISTANT:")
        with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=60) as response:
            assert response.status_code == 200 and b'"error_code": 0' in next(response.iter_raw())
        until(lambda: worker.backend.in_use == 0)


def test_the_api_serves_workers_that_only_send_whole_texts() -> None:
    """Published workers ignore `stream_mode` and begin every frame with the prompt."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    with live_controller() as controller, live_worker(controller=controller.url, info=OLD) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        original = worker.worker.generate

        async def old(body: Any, request_id: str) -> Any:
            return await original(body.model_copy(update={"stream_mode": "cumulative"}), request_id)

        worker.worker.generate = old  # type: ignore[method-assign]
        reply = post(controller.url, "/v1/chat/completions", {**chat, "max_tokens": 4}).json()
        assert reply["choices"][0]["message"]["content"] == "w0 w1 w2 w3 "
        stream = post(controller.url, "/v1/chat/completions", {**chat, "max_tokens": 4, "stream": True}).text
        events = [json.loads(line[6:]) for line in stream.split("\n\n") if line and line != "data: [DONE]"]
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "w0 w1 w2 w3 "
        assert stream.endswith("data: [DONE]\n\n")
        worker.engine.step_error = RuntimeError("x")
        failed = post(controller.url, "/v1/chat/completions", {**chat, "stream": True}).text
        assert '"code": "internal"' in failed
        assert failed.endswith("data: [DONE]\n\n")


def test_stop_strings_hold_behind_an_engine_that_does_not_heed_them() -> None:
    models = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())
    words = [{"choices": [{"delta": {"content": text}}]} for text in ("one ", "two. ", "EN", "D three")]
    end: dict[str, Any] = {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"completion_tokens": 9}}
    with decoy(models) as engine, adapter(f"{engine.url}/v1") as (url, worker):
        engine.reply = upstream_reply(*words, end, "[DONE]")
        for stop, answer, reason in ((["END", "</s>"], "one two.", "stop"), (["zzz"], "one two. END three", "length")):
            frames = frames_of(generate(url, request_body("USER: x ASSISTANT:", stop=stop)))
            assert (frames[-1]["text"], frames[-1]["finish_reason"]) == ("USER: x ASSISTANT:" + answer, reason)
            until(lambda: worker.backend.in_use == 0)


def test_a_scheduler_that_stops_leaves_nobody_waiting() -> None:
    async def scene() -> str:
        engine = StubEngine(pause=0.001)
        scheduler = Scheduler(engine, 2, 0)
        slot = scheduler.admit()
        await slot.submit(Request("x", (), SamplingParams(100_000)))
        await scheduler.stop()
        while True:
            event = await asyncio.wait_for(slot.events.get(), 60)
            if event.completion is not None:
                assert scheduler.in_use == 0
                return event.completion.finish_reason

    assert asyncio.run(scene()) == "error"
