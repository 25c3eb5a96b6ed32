"""LoRA adapters as models: listed beside their base, chosen by name, with their own templates, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llava.engine import Request, SamplingParams
from llava.engine.arguments import EngineArgs
from llava.serve import model_worker
from llava.serve.common.protocol import AdapterInfo, WorkerStatus
from llava.serve.control.registry import Registry
from llava.serve.web.answer import choose_template
from llava.serve.worker.local_backend import BackendSettings, LoadedModel, model_loader
from tests import tiny
from tests.serve.stubs import (
    INFO,
    MODEL,
    PATIENCE,
    TLS,
    LiveController,
    LiveWorker,
    StubEngine,
    frames_of,
    generate,
    get,
    live_controller,
    live_worker,
    request_body,
    until,
)

ADAPTERS = [
    AdapterInfo(name="birds", root="run_checkpoint-7", conv_template="llava_v1"),
    AdapterInfo(name="team/cats", root="cats"),
]
NAMES = sorted([MODEL, "birds", "team/cats"])
WITH_ADAPTERS = INFO.model_copy(update={"adapters": ADAPTERS})


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[LiveController, LiveWorker]]:
    engine = StubEngine()

    def load(_: object) -> LoadedModel:
        return LoadedModel(engine, WITH_ADAPTERS, name=MODEL)

    with live_controller() as controller, live_worker(engine, load=load, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == NAMES)
        yield controller, worker


def client_of(url: str) -> openai.OpenAI:
    http = httpx.Client(trust_env=False, verify=TLS)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, http_client=http)


def test_models_are_listed_with_their_base(parts: tuple[LiveController, LiveWorker]) -> None:
    listed = get(parts[0].url, "/v1/models").json()["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in listed] == [
        ("birds", "run_checkpoint-7", MODEL),
        (MODEL, MODEL, None),
        ("team/cats", "cats", MODEL),
    ]
    assert {one["max_model_len"] for one in listed} == {100_000}
    assert get(parts[0].url, "/v1/models/team/cats").json()["parent"] == MODEL


def test_a_request_names_its_adapter(parts: tuple[LiveController, LiveWorker]) -> None:
    controller, worker = parts
    with client_of(controller.url) as client:
        for model, lora in ((MODEL, None), ("birds", "birds"), ("team/cats", "team/cats")):
            hello: Any = [{"role": "user", "content": "hello"}]
            client.chat.completions.create(model=model, messages=hello, max_tokens=1)
            request = worker.engine.history[-1].request
            assert request.lora == lora
            # the templates of the base and of the first adapter differ in the system prompt
            assert ("curious human" in str(request.prompt)) == (model == "birds")
            client.completions.create(model=model, prompt="x", max_tokens=1)
            assert worker.engine.history[-1].request.lora == lora
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="dogs", messages=hello)
        assert unknown.value.code == "model_not_found"


def test_a_worker_does_not_answer_for_unknown_adapters(parts: tuple[LiveController, LiveWorker]) -> None:
    (frame,) = frames_of(generate(parts[1].url, {**request_body(tokens=1), "model": "dogs"}))
    assert (frame["error"]["type"], frame["error_code"]) == ("model_not_found", 2)
    assert frame["text"] == f"This worker serves {MODEL}, birds, team/cats only."
    assert frames_of(generate(parts[1].url, {**request_body(tokens=1), "model": ""}))[-1]["finish_reason"] == "length"
    assert parts[1].engine.history[-1].request.lora is None


def test_pages_and_parents_see_the_adapters(parts: tuple[LiveController, LiveWorker]) -> None:
    status = parts[1].worker.status()
    assert choose_template(status, "birds") == "llava_v1"
    assert choose_template(status, MODEL) == "vicuna_v1" == choose_template(status, "team/cats")
    total = parts[0].registry.total()
    assert total.model_names == NAMES and total.adapter("birds") == ADAPTERS[0]
    assert total.base == MODEL
    registry = Registry()
    registry.put("http://a", True, status, probed=True)
    registry.put("http://b", True, WorkerStatus(model_names=["other"], speed=1.0, queue_length=0), probed=True)
    assert registry.total().info is None


def test_names_must_differ(tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model-path", str(tiny_dirs["chat"]), "--port", "0", "--no-register", "--device", "cpu"]
    assert model_worker.main([*words, "--model-name", "a", "--lora", "a=x"]) == 2
    assert "none may be named like the base (a)" in capsys.readouterr().err
    assert model_worker.main([*words, *(f"--lora=n{number}=x" for number in range(64))]) == 2
    assert "At most 63 adapters" in capsys.readouterr().err


def test_a_tiny_model_with_an_adapter(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.make_lora(tmp_path / "run", tiny_dirs["chat"], tiny_dirs["chat"])
    args = EngineArgs(str(tiny_dirs["chat"]), device="cpu", max_batch_size=4, lora={"mine": str(run)})
    loaded = model_loader(args, MODEL, None, BackendSettings())(lambda fraction: None)
    assert [one.model_dump() for one in loaded.info.adapters] == [
        {"name": "mine", "root": "run", "conv_template": "v1"}
    ]
    prompts = [("once upon", name) for name in (None, "mine")]
    expected = loaded.engine.generate(  # type: ignore[attr-defined]
        [Request(text, params=SamplingParams(12), strip=False, lora=name) for text, name in prompts]
    )
    with live_controller() as controller, live_worker(load=lambda _: loaded, controller=controller.url):
        until(lambda: controller.registry.models() == ["mine", MODEL])
        with client_of(controller.url) as client:
            texts = [
                client.completions.create(model=name or MODEL, prompt=text, max_tokens=12, temperature=0)
                .choices[0]
                .text
                for text, name in prompts
            ]
    assert texts == [answer.text for answer in expected] and texts[0] != texts[1]
