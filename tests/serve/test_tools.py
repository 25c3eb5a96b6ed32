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
            (upstream_reply(chunk, {"error": {"message": "secret"}}), "internal"),
            (http_reply(b"busy", status="429 Too Many"), "overloaded"),
            (http_reply(b'{"error": "context length"}', status="400 Bad"), "context_length_exceeded"),
            (http_reply(b"no", status="400 Bad"), "bad_request"),
            (http_reply(b"secret", status="500 Oops"), "worker_unavailable"),
        ):
            engine.reply = reply
            answer = generate(url, request_body("USER: x ASSISTANT:"))
            assert frames_of(answer)[-1]["error"]["type"] == kind
            assert "secret" not in answer.text
            until(lambda: worker.backend.in_use == 0)
        assert b"Bearer key" in engine.received[-1]
        engine.reply = upstream_reply(chunk, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]")
        assert frames_of(generate(url, request_body("USER: x ASSISTANT:")))[-1]["text"].endswith("hel")
        worker.backend.capacity = 0  # type: ignore[attr-defined]
        assert generate(url, request_body("USER: x ASSISTANT:")).status_code == 503


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
