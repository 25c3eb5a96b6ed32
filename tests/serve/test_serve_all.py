"""`llava serve`: its services, child processes under a supervisor, and the three real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava.serve import main as serve
from llava.serve import serve_all
from llava.serve.common.server import bind_socket, port_of
from llava.serve.controller import ControllerArgs
from llava.serve.serve_all import (
    ChildFailed,
    ChildProcess,
    Supervisor,
    build_parser,
    controller_arguments,
    listed_models,
    summary,
    web_arguments,
)
from tests.serve.fake_service import FakeService
from tests.serve.programs import alive, children
from tests.serve.stubs import until

# --- services -----------------------------------------------------------------------------------------------------


def test_every_service_has_its_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for service, (module, _) in serve.SERVICES.items():
        assert f"  {service} " in shown
        assert Path(*module.split(".")).with_suffix(".py").is_file()
    assert serve.main([]) == 2 and "usage: llava serve SERVICE" in capsys.readouterr().err
    assert serve.main(["everything"]) == 2 and "got 'everything'" in capsys.readouterr().err


def test_the_other_arguments_go_to_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        serve.main(["web", "--help"])
    assert done.value.code == 0 and "--model-list-mode" in capsys.readouterr().out


def test_flags_are_distributed() -> None:
    line = ["--model", "m", "--port", "7", "--embed", "--device", "cpu", "--load-4bit"]
    args, worker_flags = build_parser().parse_known_args(line)
    assert worker_flags == ["--device", "cpu", "--load-4bit"] and args.model == ["m"]
    assert web_arguments(args) == ["--port", "7", "--embed"]
    args = build_parser().parse_args(["--model", "m", "--api-port", "9", "--allowed-origins", "https://a.example", "*"])
    assert controller_arguments(args) == ["--port", "9", "--allowed-origins", "https://a.example", "*"]


def test_the_port_of_the_api_is_the_controllers_or_the_next_free_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = build_parser().parse_args(["--model", "m"])
    with bind_socket("127.0.0.1", 0) as sock:
        sock.listen()
        taken = port_of(sock)
        monkeypatch.setattr(serve_all, "_API_PORT", taken)
        (_, port) = controller_arguments(args)
    assert int(port) > taken
    assert f"Port {taken} is in use; the API listens on port {port}." in capsys.readouterr().err
    assert controller_arguments(args) == ["--port", str(taken)] and capsys.readouterr().err == ""
    assert ControllerArgs().port == 21001


def test_the_summary_is_a_request_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_TOKEN", raising=False)
    monkeypatch.delenv("LLAVA_API_KEYS", raising=False)
    page, api, line = summary("http://127.0.0.1:7860", "http://127.0.0.1:21001", "it's").splitlines()
    assert (page, api) == ("http://127.0.0.1:7860", "API: http://127.0.0.1:21001/v1")
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://127.0.0.1:21001/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's" and "Content-Type: application/json" in words
    monkeypatch.setenv("LLAVA_TOKEN", "secret")
    shown = summary("p", "a", "m")
    assert "Bearer KEY" in shown and "KEY is a key of LLAVA_TOKEN" in shown and "secret" not in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--controller", "http://x"], "--controller of a worker cannot be set here"),
        (["--worker=http://x"], "--worker of a worker cannot be set here"),
        (["--model", "b", "--model-name", "x"], "--model-name names a single model"),
        (["--model", "b", "--lora", "x=y"], "--lora belongs to a single base, but 2 were given"),
    ],
)
def test_contradictions_are_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_all.main(["--model", "a", *flags]) == 2
    assert words in capsys.readouterr().err


# --- child processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of a few lines; returns its name."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def make(body: str) -> str:
        (tmp_path / "program_of_a_child.py").write_text("import signal, sys, time\n" + textwrap.dedent(body))
        return "program_of_a_child"

    return make


LISTENS = "sys.stderr.write('INFO | Listening on http://127.0.0.1:5\\n')\n"


def test_the_address_of_a_child_is_read_and_it_is_stopped(program: Callable[[str], str]) -> None:
    supervisor = Supervisor(5)
    child = supervisor.start("one", program(LISTENS + "time.sleep(600)"), [])
    assert supervisor.address_of(child) == "http://127.0.0.1:5"
    supervisor.check()
    supervisor.stop()
    assert not alive(child.process.pid)
    assert child.process.returncode == -signal.SIGTERM


def test_a_child_that_exits_is_reported_with_its_last_error(program: Callable[[str], str]) -> None:
    supervisor = Supervisor(5)
    last = "sys.stderr.write('error: the disk is full\\nnow | INFO | m | Stopping.\\n'); sys.exit(1)"
    child = supervisor.start("one", program(last), [])
    with pytest.raises(ChildFailed, match="The one exited with status 1: error: the disk is full"):
        supervisor.address_of(child)
    supervisor.stop()


def test_a_child_that_ignores_sigterm_is_killed(program: Callable[[str], str]) -> None:
    stubborn = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS + "time.sleep(600)")
    child = ChildProcess("one", stubborn, [])
    until(lambda: child.address)
    child.stop(0.2, force=lambda: False)
    assert child.process.returncode == -signal.SIGKILL


def test_a_second_signal_does_not_wait(program: Callable[[str], str]) -> None:
    stubborn = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS + "time.sleep(600)")
    supervisor = Supervisor(600)
    supervisor.address_of(supervisor.start("one", stubborn, []))
    supervisor.on_signal(signal.SIGINT, None)
    supervisor.on_signal(signal.SIGINT, None)
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 60
    with pytest.raises(KeyboardInterrupt):
        supervisor.check()


def test_signals_stop_the_children_and_handlers_are_restored(program: Callable[[str], str]) -> None:
    supervisor, before = Supervisor(5), signal.getsignal(signal.SIGTERM)

    def serve_until_signal() -> None:
        with supervisor.handle_signals():
            supervisor.address_of(supervisor.start("one", program(LISTENS + "time.sleep(600)"), []))
            os.kill(os.getpid(), signal.SIGTERM)
            until(supervisor.check)

    with pytest.raises(KeyboardInterrupt):
        serve_until_signal()
    assert not alive(supervisor.children[0].process.pid) and signal.getsignal(signal.SIGTERM) is before


def test_a_child_does_not_outlive_its_parent(program: Callable[[str], str]) -> None:
    """Not even `kill -9`, and not a child that ignores SIGTERM."""
    stubborn = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS + "time.sleep(600)")
    lines = f"""
        import time
        from llava.serve.serve_all import ChildProcess
        child = ChildProcess("one", "{stubborn}", [], grace=0.1)
        while not child.address:
            time.sleep(0.01)
        print(child.process.pid, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(lines)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until(lambda: not alive(pid))


def test_models_listed_by_a_page() -> None:
    assert listed_models("http://127.0.0.1:9") == []
    with FakeService().serving() as service:  # has no /ready
        assert listed_models(service.url) == []


# --- real processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def stack(
    tiny_dirs: dict[str, Path], child_environment: dict[str, str], tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "llava", "serve", "all", "--model", str(tiny_dirs["chat"]), "--port", "0"]
    command += ["--api-port", "0"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=log, text=True, env=child_environment
    )
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(60)
    assert process.stdout is not None
    process.stdout.close()
    log.close()


@pytest.mark.slow
def test_one_command_serves_a_model(stack: subprocess.Popen[str], tmp_path: Path) -> None:
    assert stack.stdout is not None
    address = stack.stdout.readline().strip()
    log = (tmp_path / "log").read_text()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), log
    with urllib.request.urlopen(f"{address}/ready", timeout=30) as reply:
        assert json.load(reply) == {"models": ["internvl-chat-tiny"]}
    api, example = stack.stdout.readline().split()[1], shlex.split(stack.stdout.readline())
    with urllib.request.urlopen(f"{api}/models", timeout=30) as reply:
        assert [model["id"] for model in json.load(reply)["data"]] == ["internvl-chat-tiny"]
    asked = urllib.request.Request(example[1], example[-1].encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        assert json.load(reply)["choices"][0]["message"]["role"] == "assistant"
    pids = children(stack.pid)
    assert len(pids) == 3
    worker = next(pid for pid in pids if "model_worker" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)  # the others must not live on alone
    assert stack.wait(60) == 1
    assert stack.stdout.read() == ""
    assert not any(map(alive, pids))
    assert "error: The worker exited with status -9" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_ctrl_c_while_starting_leaves_nothing(stack: subprocess.Popen[str]) -> None:
    pids = until(lambda: children(stack.pid), seconds=120)
    stack.send_signal(signal.SIGINT)
    assert stack.wait(60) == 0
    assert not any(map(alive, pids))
