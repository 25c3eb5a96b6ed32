"""Exit statuses, optional packages, logging, moderation and the other helpers of `llava.utils`."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from llava import utils
from llava.errors import CheckpointError, DependencyError


@pytest.mark.parametrize(("error", "status"), [(CheckpointError("No\n weights."), 2), (KeyboardInterrupt(), 130)])
def test_guarded_turns_errors_into_statuses(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @utils.guarded
    def main(argv: Sequence[str] | None = None) -> int:
        """A docstring."""
        raise error

    assert main([]) == status
    assert capsys.readouterr().err == ("error: No weights. [CHECKPOINT]\n" if status == 2 else "")
    assert main.__doc__ == "A docstring."


def test_guarded_lets_defects_through() -> None:
    with pytest.raises(ZeroDivisionError):
        utils.guarded(lambda argv: 1 // 0)()


@pytest.mark.parametrize("lines", [1, 100_000])
def test_guarded_is_silent_on_a_closed_pipe(lines: int) -> None:
    """Also if output is still buffered at exit."""
    program = f"import llava.utils as u, sys; sys.exit(u.guarded(lambda argv: print('x' + chr(10) * {lines}) or 0)())"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_require_returns_the_module() -> None:
    assert utils.require("json.decoder", "train").__name__ == "json.decoder"


def test_require_silences_bitsandbytes() -> None:
    utils.require("json", "x")
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_require_names_the_extra() -> None:
    with pytest.raises(DependencyError, match=r"nonsense_package .*pip install 'llava\[serve\]' \[DEPENDENCY\]"):
        utils.require("nonsense_package.part", "serve")


def test_require_keeps_the_error_of_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("raise OSError('libcudart.so.11 not found')\n", encoding="utf-8")
    (tmp_path / "broken_two.py").write_text("import missing_dependency\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DependencyError, match="cannot be imported.*OSError: libcudart.so.11 not found"):
        utils.require("broken_one", "flash")
    with pytest.raises(DependencyError, match="broken_two is installed but.*missing_dependency"):
        utils.require("broken_two", "flash")


def test_disable_torch_init(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)
    utils.disable_torch_init()
    norm = torch.nn.LayerNorm(4)
    norm.weight.data.fill_(3)
    norm.reset_parameters()
    assert norm.weight.eq(3).all()
    linear = torch.nn.Linear(2, 2)
    linear.weight.data.fill_(3)  # not initialized
    before = linear.weight.detach().clone()
    linear.reset_parameters()
    assert torch.equal(linear.weight, before)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield root
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers


def test_build_logger_writes_one_dated_line_to_the_file(
    root_logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGDIR", str(tmp_path / "logs"))
    quiet = logging.getLogger("tests.quiet")
    monkeypatch.setattr(quiet, "propagate", False)
    monkeypatch.setattr(quiet, "handlers", [])
    logger = utils.build_logger("tests.worker", "worker.log")
    utils.build_logger("tests.worker", "worker.log").info("ready on %s", "cpu")
    quiet.warning("heard")
    lines = (tmp_path / "logs" / "worker.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    date, level, name, message = lines[0].split(" | ")
    assert (len(date), level, name, message) == (19, "INFO", "tests.worker", "ready on cpu")
    assert lines[1].endswith("| WARNING | tests.quiet | heard")
    assert logger.level == logging.INFO


def test_build_logger_without_a_file_writes_to_stderr(root_logger: logging.Logger) -> None:
    root_logger.handlers.clear()
    utils.build_logger("tests.plain")
    (handler,) = root_logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    assert handler.formatter is not None
    assert handler.formatter._fmt == utils.LOG_FORMAT


@pytest.mark.parametrize(
    ("reply", "flagged"),
    [
        ({"results": [{"flagged": True}]}, True),
        ({"results": [{"flagged": False}]}, False),
        ({"error": "no key"}, False),
        (requests.ConnectionError("offline"), False),
    ],
)
def test_moderation(reply: Any, flagged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Reply:
        def json(self) -> Any:
            return reply

    def post(url: str, **request: Any) -> Reply:
        seen.update(request, url=url)
        if isinstance(reply, Exception):
            raise reply
        return Reply()

    monkeypatch.setattr(requests, "post", post)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert utils.violates_moderation("two\nlines") is flagged
    assert seen["json"] == {"input": "twolines"}
    assert seen["headers"] == {"Authorization": "Bearer secret"}
    assert seen["timeout"] > 0


def test_pretty_print_semaphore() -> None:
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(2)) == "Semaphore(value=2, locked=False)"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(0)) == "Semaphore(value=0, locked=True)"
