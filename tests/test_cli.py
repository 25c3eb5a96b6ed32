"""The console command: output, imports and failures."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from llava import __version__, cli
from llava.errors import DataError
from tests.test_package import ROOT, plain_environment

HEAVY = {"torch", "transformers", "numpy", "PIL", "requests", "deepspeed", "packaging", "llava.doctor"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=plain_environment(), check=False)


def test_help_lists_every_command_and_nothing_goes_to_stderr() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert command.help in done.stdout


def test_help_answers_in_less_than_300_ms() -> None:
    """Measured as the fastest of up to 20 starts, since the machine may be busy."""

    def seconds() -> float:
        start = time.perf_counter()
        run("--help")
        return time.perf_counter() - start

    assert any(seconds() < 0.3 for _ in range(20))


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; from llava.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "llava.cli" in loaded
    assert not loaded & HEAVY


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava {__version__}\n"


def test_no_command_shows_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: llava")


@pytest.mark.parametrize(("typed", "hint"), [("doctr", "did you mean 'doctor'?"), ("zzz", "choose one of train,")])
def test_unknown_command(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: Unknown command '{typed}'; {hint}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_main(name: str) -> None:
    assert callable(importlib.import_module(cli.COMMANDS[name].module).main)


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace `llava chat` by a function that records its arguments and fails on demand."""
    calls: list[list[str]] = []

    def fake(argv: Sequence[str]) -> int:
        calls.append([sys.argv[0], *argv])
        if "--break" in argv:
            raise DataError("Record 3\nis broken; mend it.")
        if "--interrupt" in argv:
            raise KeyboardInterrupt
        return 7

    module = type(sys)("fake_chat")
    module.main = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_chat", module)
    monkeypatch.setattr(cli, "COMMANDS", {"chat": cli.Command("fake_chat", "")})
    monkeypatch.setattr(sys, "argv", ["llava"])
    return calls


def test_arguments_and_status_pass_through(fake_command: list[list[str]]) -> None:
    assert cli.main(["chat", "--flag", "a b"]) == 7
    assert fake_command == [["llava chat", "--flag", "a b"]]


def test_errors_become_one_line(fake_command: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--break"]) == 2
    assert capsys.readouterr().err == "error: Record 3 is broken; mend it. [DATA]\n"
    assert cli.main(["chat", "--interrupt"]) == 130


def test_a_known_bad_combination_of_versions_stops_a_command(
    fake_command: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava.doctor.installed_versions", lambda packages: {"accelerate": "1.2.0"})
    assert cli.main(["chat"]) == 2
    assert "accelerate 1.2.0 does not work" in capsys.readouterr().err
    assert fake_command == []


def test_python_m_llava_is_the_same_command() -> None:
    assert run("--version").stdout == f"llava {__version__}\n"
    assert run("nonsense").returncode == 2
    assert os.linesep.join(run().stderr.splitlines()[:1]).startswith("usage: llava")
