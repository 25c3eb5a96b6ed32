"""`llava serve`: its parts, a stack that ends as a whole, and the real three processes behind one address."""

from __future__ import annotations

import json
import os
import re
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
from llava.serve.serve_all import ChildFailed, ChildProcess, Supervisor, build_parser, listed_models, web_arguments
from tests.serve.fake_service import FakeService
from tests.serve.programs import alive, children
from tests.serve.stubs import until

# --- which part -----------------------------------------------------------------------------------------------------


def test_every_part_has_its_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for part, (module, _) in serve.SERVICES.items():
        assert f"  {part} " in shown
        assert Path(*module.split(".")).with_suffix(".py").is_file()
    assert serve.main([]) == 2 and "usage: llava serve SERVICE" in capsys.readouterr().err
    assert serve.main(["everything"]) == 2 and "got 'everything'" in capsys.readouterr().err


def test_the_rest_of_the_line_goes_to_the_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        serve.main(["web", "--help"])
    assert done.value.code == 0 and "--model-list-mode" in capsys.readouterr().out


def test_flags_are_shared_out() -> None:
    line = ["--model", "m", "--port", "7", "--embed", "--device", "cpu", "--load-4bit"]
    args, worker_flags = build_parser().parse_known_args(line)
    assert worker_flags == ["--device", "cpu", "--load-4bit"] and args.model == ["m"]
    assert web_arguments(args) == ["--port", "7", "--embed"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--controller", "http://x"], "--controller of a worker cannot be set here"),
        (["--worker=http://x"], "--worker of a worker cannot be set here"),
        (["--model", "b", "--model-name", "x"], "--model-name names a single model"),
    ],
)
def test_contradictions_are_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_all.main(["--model", "a", *flags]) == 2
    assert words in capsys.readouterr().err


# --- parts and stacks -----------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A module of a part, made of a few lines."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def make(body: str) -> str:
        (tmp_path / "program_of_a_part.py").write_text("import signal, sys, time\n" + textwrap.dedent(body))
        return "program_of_a_part"

    return make


LISTENS = "sys.stderr.write('INFO | Listening on http://127.0.0.1:5\\n')\n"


def test_a_part_says_where_it_listens_and_is_ended(program: Callable[[str], str]) -> None:
    stack = Supervisor(5)
    part = stack.start("one", program(LISTENS + "time.sleep(600)"), [])
    assert stack.address_of(part) == "http://127.0.0.1:5"
    stack.check()
    stack.stop()
    assert not alive(part.process.pid)
    assert part.process.returncode == -signal.SIGTERM


def test_a_part_that_ends_is_noticed_with_its_last_words(program: Callable[[str], str]) -> None:
    stack = Supervisor(5)
    last = "sys.stderr.write('error: the disk is full\\nnow | INFO | m | Stopping.\\n'); sys.exit(1)"
    part = stack.start("one", program(last), [])
    with pytest.raises(ChildFailed, match="The one exited with status 1: error: the disk is full"):
        stack.address_of(part)
    stack.stop()


def test_a_part_that_will_not_end_is_ended_by_force(program: Callable[[str], str]) -> None:
    deaf = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS + "time.sleep(600)")
    part = ChildProcess("one", deaf, [])
    until(lambda: part.address)
    part.stop(0.2, force=lambda: False)
    assert part.process.returncode == -signal.SIGKILL


def test_a_second_signal_does_not_wait(program: Callable[[str], str]) -> None:
    deaf = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS + "time.sleep(600)")
    stack = Supervisor(600)
    stack.address_of(stack.start("one", deaf, []))
    stack.on_signal(signal.SIGINT, None)
    stack.on_signal(signal.SIGINT, None)
    began = time.monotonic()
    stack.stop()
    assert time.monotonic() - began < 60
    with pytest.raises(KeyboardInterrupt):
        stack.check()


def test_signals_end_the_stack_and_are_given_back(program: Callable[[str], str]) -> None:
    stack, before = Supervisor(5), signal.getsignal(signal.SIGTERM)

    def serve_until_told() -> None:
        with stack.handle_signals():
            stack.address_of(stack.start("one", program(LISTENS + "time.sleep(600)"), []))
            os.kill(os.getpid(), signal.SIGTERM)
            until(stack.check)

    with pytest.raises(KeyboardInterrupt):
        serve_until_told()
    assert not alive(stack.children[0].process.pid) and signal.getsignal(signal.SIGTERM) is before


def test_a_part_does_not_outlive_whoever_started_it(program: Callable[[str], str]) -> None:
    """Not even `kill -9`, and not a part that is deaf to SIGTERM."""
    deaf = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTENS + "time.sleep(600)")
    lines = f"""
        import time
        from llava.serve.serve_all import ChildProcess
        part = ChildProcess("one", "{deaf}", [], grace=0.1)
        while not part.address:
            time.sleep(0.01)
        print(part.process.pid, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(lines)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until(lambda: not alive(pid))


def test_what_a_page_lists() -> None:
    assert listed_models("http://127.0.0.1:9") == []
    with FakeService().serving() as service:  # has no /ready
        assert listed_models(service.url) == []


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.fixture
def stack(
    tiny_dirs: dict[str, Path], child_environment: dict[str, str], tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "llava", "serve", "all", "--model", str(tiny_dirs["chat"]), "--port", "0"]
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
    parts = children(stack.pid)
    assert len(parts) == 3
    worker = next(pid for pid in parts if "model_worker" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)  # the others must not live on alone
    assert stack.wait(60) == 1
    assert stack.stdout.read() == ""
    assert not any(map(alive, parts))
    assert "error: The worker exited with status -9" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_ctrl_c_while_starting_leaves_nothing(stack: subprocess.Popen[str]) -> None:
    parts = until(lambda: children(stack.pid), seconds=120)
    stack.send_signal(signal.SIGINT)
    assert stack.wait(60) == 0
    assert not any(map(alive, parts))
