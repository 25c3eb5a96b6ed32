"""The model worker over real sockets: frames as published, limits, and what the stub engine saw."""

from __future__ import annotations

import json
import threading

import pytest

from llava.serve.local_model import Settings
from tests.serve.stubs import StubEngine, frames_of, generate, live_worker, post, request_body, until


def test_frames_are_as_published_and_the_last_says_why_it_ended() -> None:
    with live_worker() as worker:
        response = generate(worker.url, request_body("hi", 2))
    assert response.status_code == 200
    expected = [json.dumps({"text": f"hi{words}", "error_code": 0}).encode() for words in ("w0 ",)]
    assert response.content.split(b"\0")[0] == expected[0]
    last = frames_of(response)[-1]
    assert last["text"] == "hiw0 w1 "
    assert last["finish_reason"] == "length"
    assert last["usage"] == {"prompt_tokens": 2, "image_tokens": 0, "completion_tokens": 2}


def test_delta_frames_join_to_the_answer() -> None:
    with live_worker() as worker:
        frames = frames_of(generate(worker.url, request_body("hi", 5, stream_mode="delta")))
    assert "".join(frame["text"] for frame in frames) == "w0 w1 w2 w3 w4 "


def test_stream_interval_spaces_frames_but_not_the_first() -> None:
    with live_worker(StubEngine(pause=0.02), stream_interval=4) as worker:
        frames = frames_of(generate(worker.url, request_body("", 9)))
    assert frames[0]["text"] == "w0 "
    assert len(frames) <= 4
    assert frames[-1]["text"].endswith("w8 ")


def test_status_has_the_published_keys() -> None:
    with live_worker() as worker:
        status = post(worker.url, "/worker_get_status").json()
    assert {key: status[key] for key in ("model_names", "speed", "queue_length")} == {
        "model_names": ["stub"],
        "speed": 1.0,
        "queue_length": 0,
    }


def test_requests_of_several_clients_share_the_batch() -> None:
    engine = StubEngine(batch=4)
    engine.gate.clear()
    with live_worker(engine, Settings(limit=4)) as worker:
        threads = [threading.Thread(target=generate, args=(worker.url, request_body(tokens=3))) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: worker.in_use == 4)
        engine.gate.set()
        for thread in threads:
            thread.join()
        until(lambda: worker.metric("llava_requests_total", outcome="length") == 4)


@pytest.mark.parametrize("key", ["org_images", "max_input_tiles", "anything"])
def test_unknown_keys_are_ignored(key: str) -> None:
    with live_worker() as worker:
        assert generate(worker.url, request_body(tokens=1, **{key: ["x"]})).status_code == 200
