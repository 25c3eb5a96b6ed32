"""SIGTERM under load: controller and page complete running answers, refuse new ones and exit with status 0."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.gradio_client import Visitor
from tests.serve.programs import START, program
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    StubEngine,
    frames_of,
    generate,
    live_controller,
    live_worker,
    post,
    request_body,
    until,
)

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}


def test_a_controller_completes_its_streams(child_environment: dict[str, str]) -> None:
    engine = StubEngine()
    with program(child_environment, "controller", "--port", "0") as controller:
        address = controller.url
        with live_worker(engine, controller=address):
            until(lambda: post(address, "/list_models").json()["models"] == [MODEL])
            chat = httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False)
            body = {**CHAT, "max_tokens": 50}
            with chat, chat.stream("POST", "/v1/chat/completions", json=body) as running:
                engine.gate.clear()
                lines = running.iter_lines()
                next(lines)
                controller.process.send_signal(signal.SIGTERM)
                until(lambda: "Stopping" in controller.text)
                refused = generate(address, request_body())
                assert (refused.status_code, frames_of(refused)[0]["error"]["type"]) == (503, "not_ready")
                assert httpx.get(f"{address}/ready", trust_env=False).status_code == 503
                assert controller.process.poll() is None
                engine.gate.set()
                assert "w49" in (rest := list(lines))[-6] and rest[-2] == "data: [DONE]"
            assert controller.process.wait(START) == 0
        assert "Traceback" not in controller.text and "ERROR" not in controller.text


def test_streams_that_outlast_the_grace_of_a_controller_end_with_an_error(child_environment: dict[str, str]) -> None:
    engine = StubEngine()
    with program(child_environment, "controller", "--port", "0", "--grace-seconds", "0.2") as controller:
        address = controller.url
        with live_worker(engine, controller=address):
            until(lambda: post(address, "/list_models").json()["models"] == [MODEL])
            chat = httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False)
            frames = {"json": request_body(tokens=1000), "timeout": PATIENCE}
            with (
                chat,
                chat.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 1000}) as running,
                chat.stream("POST", "/worker_generate_stream", **frames) as other,
            ):
                engine.gate.clear()
                controller.process.send_signal(signal.SIGTERM)
                events = [json.loads(line[6:]) for line in running.iter_lines() if line.startswith("data: {")]
                error = events[-1]["error"]
                last = json.loads(other.read().split(b"\0")[-2])
                assert (error["error_type"], last["error"]["type"]) == ("worker_unavailable", "worker_unavailable")
                assert "stopped" in error["message"] and "stopped" in last["text"]
            assert controller.process.wait(START) == 0
        assert "Traceback" not in controller.text


def test_a_worker_whose_answers_outlast_its_grace_says_so() -> None:
    engine = StubEngine()
    with live_worker(engine) as worker:
        scheduler = worker.worker.backend.scheduler  # type: ignore[attr-defined]
        with httpx.stream("POST", f"{worker.url}/worker_generate_stream", json=request_body(tokens=9999)) as answer:
            engine.gate.clear()
            drained = asyncio.run_coroutine_threadsafe(worker.worker.drain(0.1), scheduler._loop)
            until(lambda: scheduler._stopping)
            engine.gate.set()
            last = json.loads(answer.read().split(b"\0")[-2])
        drained.result(PATIENCE)
        assert last["error"]["type"] == "worker_unavailable" and "stopped" in last["text"]


def test_a_worker_that_is_loading_stops_at_once(child_environment: dict[str, str], tmp_path: Path) -> None:
    """A model that takes minutes to load does not delay the end of the process."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "worker.py").write_text(
        "import sys, time\n"
        "from llava.engine.arguments import EngineArgs\n"
        "EngineArgs.build_engine = lambda self, progress: time.sleep(600)\n"
        "from llava.serve.model_worker import main\n"
        "sys.exit(main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    environment = {**child_environment, "PYTHONPATH": f"{child_environment['PYTHONPATH']}:{tmp_path}"}
    words = ["--port", "0", "--no-register", "--model-path", "none", "--device", "cpu"]
    with program(environment, "slow.worker", *words) as worker:
        assert httpx.get(f"{worker.url}/ready", trust_env=False).json()["reason"] == "loading"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0


@pytest.mark.slow
def test_a_page_completes_its_answers(child_environment: dict[str, str]) -> None:
    """It does not wait for a browser that keeps its page open, nor logs an error for it."""
    engine = StubEngine()
    with live_controller() as controller, live_worker(engine, controller=controller.url):
        until(lambda: controller.registry.models() == [MODEL])
        words = ["--controller", controller.url, "--port", "0", "--model-list-mode", "reload"]
        with program(child_environment, "gradio_web_server", *words) as page, ExitStack() as stack:
            http = stack.enter_context(httpx.Client(base_url=page.url, timeout=PATIENCE, trust_env=False))
            visitor, late = Visitor(http, MODEL), Visitor(http, MODEL)
            beats = stack.enter_context(http.stream("GET", f"/gradio_api/heartbeat/{visitor.session}"))
            assert beats.is_success
            engine.gate.clear()
            visitor.send("hello")
            with visitor.events() as events:
                until(lambda: engine.jobs)
                page.process.send_signal(signal.SIGTERM)
                until(lambda: "Stopping" in page.text)
                assert http.get("/ready").status_code == 503
                late.send("too late")
                with late.events() as others:
                    assert any("restarting" in json.dumps(event) for event in others)
                assert page.process.poll() is None
                engine.gate.set()
                assert any("w1023" in json.dumps(event) for event in events)
            assert page.process.wait(START) == 0
        assert "Traceback" not in page.text and "ERROR" not in page.text
