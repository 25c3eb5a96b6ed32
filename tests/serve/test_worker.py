"""The model worker over real sockets: frames as published, limits, and what the stub engine saw."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.engine import Engine, Request
from llava.engine.sequence import HashedImage
from llava.errors import ContextLengthError
from llava.serve.common.protocol import WorkerStatus
from llava.serve.worker.heartbeat import HeartBeat
from llava.serve.worker.local_backend import BackendSettings, LoadedModel, LocalBackend
from llava.serve.worker.preprocess import ImagePreprocessor, tokenizer_for
from tests.serve.stubs import (
    INFO,
    MODEL,
    StubEngine,
    b64,
    frames_of,
    generate,
    live_controller,
    live_worker,
    png,
    post,
    request_body,
    until,
)


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


def test_the_controller_knows_how_far_loading_is() -> None:
    def load(tell: Callable[[float], None]) -> LoadedModel:
        for share, percent in ((0.47, 45), (0.9, 90)):
            tell(share)
            until(lambda percent=percent: [view.progress for view in controller.registry.views()] == [percent])
        return LoadedModel(StubEngine(), INFO)

    with live_controller() as controller, live_worker(load=load, controller=controller.url):
        until(lambda: controller.registry.models() == [MODEL])
        assert [view.progress for view in controller.registry.views()] == [None]


def test_requests_of_several_clients_share_the_batch() -> None:
    engine = StubEngine(batch=4)
    engine.gate.clear()
    with live_worker(engine, BackendSettings(limit=4)) as worker:
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


def test_texts_and_images_are_preprocessed_outside_the_engine_thread() -> None:
    """A large upload delays no other request, and while it waits only the tower's input is kept."""
    threads: list[str] = []

    def pixels(image: Image.Image) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return torch.zeros(3, 2, 2)

    def tokenize(text: str) -> list[int]:
        threads.append(threading.current_thread().name)
        return [7] * len(text)

    with live_worker() as worker:
        model = worker.worker.backend
        assert isinstance(model, LocalBackend) and model._loaded is not None
        model._loaded = model._loaded._replace(tokenize=tokenize, preprocess=ImagePreprocessor(pixels))
        images = [b64(png()), b64(png(3, 3))]
        for _ in range(2):  # the second turn's images are cached
            generate(worker.url, request_body("<image><image>", 1, images=images))
        _, job = worker.engine.history
    assert len(threads) == 2 + 1 + 1
    assert all(name.startswith("prepare") for name in threads)
    assert job.request.prompt == [7] * len("<image><image>")
    assert [tuple(image.content.shape) for image in job.request.images if isinstance(image, HashedImage)] == [
        (3, 2, 2)
    ] * 2


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    """A slow tokenizer takes minutes for four million letters without a space."""
    asked: list[str] = []

    class Tokenizer:
        bos_token_id = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 2, "abcd": 3}

        def __call__(self, text: str) -> SimpleNamespace:
            asked.append(text)
            return SimpleNamespace(input_ids=[1])

    tokenize = tokenizer_for(SimpleNamespace(tokenizer=Tokenizer(), model_runner=SimpleNamespace(context_length=10)))
    asked.clear()
    with pytest.raises(ContextLengthError, match="44 characters, at least 11 tokens"):
        tokenize("abcd" * 11)
    assert not asked
    tokenize("abcd" * 10)
    assert asked


def test_prompts_are_tokenized_as_the_engine_does(engine: Engine) -> None:
    text = "USER: <image>\nWhat is in the image? ASSISTANT:"
    assert tuple(tokenizer_for(engine)(text)) == engine._prepare(Request(text, [torch.zeros(3, 56, 56)])).ids


def test_heartbeats_end_though_a_cancellation_is_lost() -> None:
    """Python 3.11's `wait_for` loses a cancellation that coincides with its result."""
    lost: list[bool] = []

    async def report() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if lost:
                raise
            lost.append(True)

    async def stop() -> None:
        beat = HeartBeat("http://127.0.0.1:9", "http://127.0.0.1:9", lambda: WorkerStatus(
            model_names=[], speed=1, queue_length=0), None)  # fmt: skip
        beat._report = report  # type: ignore[method-assign]
        beat.start()
        await asyncio.sleep(0)
        task = beat._task
        await asyncio.wait_for(beat.stop(), 30)
        assert task is not None and task.done()

    asyncio.run(stop())
    assert lost
