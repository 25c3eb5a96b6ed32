"""The published names of `llava.serve`: they import without starting anything, and behave as published."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.engine import Engine, Request, SamplingParams
from llava.serve import cli, controller, gradio_web_server, model_worker
from llava.serve.common.protocol import FrameReader
from llava.serve.controller import Controller, DispatchMethod
from llava.serve.model_worker import ModelWorker, heart_beat_worker
from tests.serve.fake_service import FakeService
from tests.serve.stubs import MODEL, b64, decoy, live_controller, live_worker, png, status_reply

NAMES = {
    "controller": ["Controller", "DispatchMethod"],
    "model_worker": ["ModelWorker", "heart_beat_worker"],
    "cli": ["main", "load_image"],
    "gradio_web_server": ["build_demo", "get_model_list"],
    "register_worker": ["main"],
    "test_message": ["main"],
}
STATUS = {"model_names": [MODEL], "speed": 1, "queue_length": 0}
GONE = "http://127.0.0.1:9"


def frames_of(chunks: Iterable[bytes]) -> list[Any]:
    reader = FrameReader()
    return [frame for chunk in chunks for frame in reader.feed(chunk)]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_TOKEN", raising=False)


def test_importing_the_names_starts_nothing(tmp_path: Path, child_environment: dict[str, str]) -> None:
    lines = [f"from llava.serve.{module} import {', '.join(names)}" for module, names in NAMES.items()]
    lines += ["import threading", "assert threading.active_count() == 1"]
    lines += ["import sys", "assert not {'fastapi', 'gradio', 'uvicorn'} & set(sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=child_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_dispatch_methods_have_their_published_names() -> None:
    assert DispatchMethod.from_str("lottery") is DispatchMethod.LOTTERY
    assert DispatchMethod.from_str("shortest_queue") is DispatchMethod.SHORTEST_QUEUE
    with pytest.raises(ValueError):
        DispatchMethod.from_str("round_robin")
    assert Controller("lottery").dispatch_method is DispatchMethod.LOTTERY


def test_a_controller_registers_lists_and_dispatches() -> None:
    registry = Controller("shortest_queue")
    assert registry.list_models() == [] and registry.get_worker_address(MODEL) == ""
    assert not registry.receive_heart_beat("http://a", 0)
    for name in ("http://a", "http://b"):
        assert registry.register_worker(name, True, STATUS)
    assert registry.list_models() == [MODEL] and list(registry.worker_info) == ["http://a", "http://b"]
    assert [registry.get_worker_address(MODEL) for _ in range(4)] == ["http://a", "http://b"] * 2
    assert registry.receive_heart_beat("http://a", 5) and registry.get_worker_address(MODEL) == "http://b"
    total = registry.worker_api_get_status()
    assert (total["model_names"], total["speed"]) == ([MODEL], 2.0)
    registry.remove_worker("http://a")
    assert list(registry.worker_info) == ["http://b"]


def test_a_controller_removes_workers_whose_heartbeats_have_stopped() -> None:
    registry = Controller("lottery")
    registry.register_worker("http://a", True, STATUS)
    registry.register_worker("http://b", False, STATUS)
    registry.registry.expiration = -1.0
    registry.remove_stable_workers_by_expiration()
    assert list(registry.worker_info) == ["http://b"]


def test_a_controller_queries_workers_at_their_addresses() -> None:
    registry = Controller("shortest_queue")
    with decoy(status_reply()) as worker:
        assert registry.register_worker(worker.url, False, None)
        assert not registry.register_worker(GONE, False, None)
        registry.register_worker(GONE, False, STATUS)
        registry.refresh_all_workers()
        assert list(registry.worker_info) == [worker.url]
    registry.refresh_all_workers()
    assert registry.worker_info == {}


def test_a_controller_forwards_the_frames_of_a_worker() -> None:
    registry = Controller("shortest_queue")
    body = {"model": MODEL, "prompt": "hi", "max_new_tokens": 2}
    assert [frame["error_code"] for frame in frames_of(registry.worker_api_generate_stream(body))] == [2]
    with live_worker() as worker:
        registry.register_worker(worker.url, False, None)
        assert frames_of(registry.worker_api_generate_stream(body))[-1]["text"] == "hiw0 w1 "
    assert [frame["error_code"] for frame in frames_of(registry.worker_api_generate_stream(body))] == [3]


@pytest.fixture(scope="module")
def worker(tiny_dirs: dict[str, Path]) -> ModelWorker:
    path = str(tiny_dirs["chat"])
    return ModelWorker(GONE, "http://127.0.0.1:8", "abc123", True, path, None, None, False, False, "cpu")


def test_a_model_worker_streams_the_answer_of_the_engine(worker: ModelWorker, engine: Engine) -> None:
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    params = {"prompt": prompt, "images": [b64(png())], "temperature": 0, "max_new_tokens": 6, "stop": "</s>"}
    image = Image.new("RGB", (20, 20))
    expected = engine.generate([Request(prompt, [image], SamplingParams(6, stop=("</s>",)))])[0]
    frames = frames_of(worker.generate_stream(params))
    assert all(frame["text"].startswith(prompt) and frame["error_code"] == 0 for frame in frames)
    assert frames[-1]["text"][len(prompt) :].strip() == expected.text
    assert frames[-1]["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert worker.get_status() == {"model_names": ["internvl-chat-tiny"], "speed": 1, "queue_length": 0}


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"prompt": "<image>"}, "image_count_mismatch"),
        ({"prompt": "<image>", "images": ["?"]}, "bad_image"),
        ({"prompt": "x", "top_p": 7}, "bad_request"),
        ({"prompt": "why " * 9000}, "context_length_exceeded"),
    ],
)
def test_the_gate_turns_failures_into_error_frames(worker: ModelWorker, params: dict[str, Any], kind: str) -> None:
    (frame,) = frames_of(worker.generate_stream_gate(params))
    assert frame["error_code"] == 1 and frame["error"]["type"] == kind
    assert worker.get_queue_length() == 0


def test_a_model_worker_registers_and_sends_heartbeats(
    worker: ModelWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model_worker, "WORKER_HEART_BEAT_INTERVAL", 0)
    worker.send_heart_beat()
    assert "Cannot reach" in caplog.text  # and nothing is raised
    with live_controller() as running:
        monkeypatch.setattr(worker, "controller_addr", running.url)
        original, calls = worker.send_heart_beat, []

        def send() -> None:
            original()
            calls.append(1)
            if len(calls) == 3:
                raise InterruptedError

        monkeypatch.setattr(worker, "send_heart_beat", send)
        with pytest.raises(InterruptedError):
            heart_beat_worker(worker)
        assert [entry.address for entry in running.registry.entries()] == [worker.worker_addr]


def test_the_terminal_chat_loads_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3, 5))
    image = cli.load_image(str(tmp_path / "a.png"))
    assert (image.mode, image.size) == ("RGB", (3, 5))


def test_the_web_server_lists_models() -> None:
    with FakeService(models=["beta", "alpha"]).serving() as service:
        assert gradio_web_server.get_model_list(service.url) == ["alpha", "beta"]
        assert service.calls == ["/refresh_all_workers", "/list_models"]


@pytest.mark.slow
def test_the_page_is_built_and_not_served(tmp_path: Path, child_environment: dict[str, str]) -> None:
    lines = """
        from llava.serve.gradio_web_server import build_demo
        for embed in (True, False):
            demo = build_demo(embed)
            print(type(demo).__name__, "Terms of use" in str(demo.get_config_file()), demo.is_running)
    """
    environment = {**child_environment, "GRADIO_TEMP_DIR": str(tmp_path)}
    words = [sys.executable, "-c", textwrap.dedent(lines)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["Blocks False False", "Blocks True False"], done.stderr


def test_the_programs_parse_their_published_flags() -> None:
    words = ["--host", "h", "--port", "1", "--dispatch-method", "lottery"]
    assert controller.ControllerArgs.from_cli_args(controller.build_parser().parse_args(words)).port == 1
