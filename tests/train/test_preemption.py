"""Runs that a scheduler ends by a signal: a checkpoint, the documented exit status, and an exact continuation."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState

from llava.train import watchdog
from llava.train.train import train
from llava.train.watchdog import REPEAT_SECONDS, PreemptionHandler
from tests.train import runs

Dirs = dict[str, Path]
STEPS = {"num_train_epochs": 4, "per_device_train_batch_size": 2, "save_strategy": "no"}


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_to_all_processes_saves_and_the_rerun_is_exact(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, number: int, status: int
) -> None:
    """The data loader's workers get the signal too, and must outlive it."""
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    more: dict[str, Any] = {**STEPS, "dataloader_num_workers": 2}
    train(runs.flags(tiny_dirs, small_data, whole, 1, **more))
    argv = runs.flags(tiny_dirs, small_data, ended, 1, **more)
    assert runs.kill_at(argv, ended, 3, tmp_path / "log", number=number) == status
    (saved,) = checkpoints(ended)
    log = (tmp_path / "log").read_text()
    assert f"{signal.Signals(number).name}: saving {saved}, then exiting with status {status}" in log
    assert "Traceback" not in log and "training finished" not in log
    runs.finish(argv, tmp_path / "log")
    assert f"Resuming from {ended / saved}" in (tmp_path / "log").read_text()
    runs.assert_equal_runs(whole, ended)


@pytest.mark.slow
def test_torchrun_ends_all_ranks_with_a_checkpoint(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    """All processes get SIGTERM, and the ranks once more from torchrun."""
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    more = {**STEPS, "per_device_train_batch_size": 1}
    runs.finish(runs.flags(tiny_dirs, small_data, whole, 1, **more), tmp_path / "log", ranks=2)
    argv = runs.flags(tiny_dirs, small_data, ended, 1, **more)
    program = [str(runs.ROOT / "llava" / "train" / "train.py")]
    runs.kill_at(argv, ended, 3, tmp_path / "log", 2, program, signal.SIGTERM)
    (saved,) = checkpoints(ended)
    assert f"SIGTERM: saving {saved}, then exiting with status 143" in (tmp_path / "log").read_text()
    runs.finish(argv, tmp_path / "log", ranks=2)
    runs.assert_equal_runs(whole, ended)


@pytest.mark.slow
def test_ctrl_c_leaves_no_traceback(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    argv = runs.flags(
        tiny_dirs, small_data, tmp_path / "run", 1, **{**STEPS, "num_train_epochs": 40}, dataloader_num_workers=2
    )
    assert runs.kill_at(argv, tmp_path / "run", 3, tmp_path / "log", number=signal.SIGINT) == 130
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "Error" not in log, log


class Reported(Dataset[int]):
    """Number of characters that a thread of a loader worker prints about an exception."""

    ERRORS = (EOFError, ConnectionResetError, ValueError)

    def __len__(self) -> int:
        return len(self.ERRORS)

    def __getitem__(self, index: int) -> int:
        error, printed = self.ERRORS[index](), io.StringIO()
        thread = threading.Thread(target=lambda: sys.excepthook(type(error), error, None))
        with contextlib.redirect_stderr(printed):
            thread.start()
            thread.join()
        return len(printed.getvalue())


def test_a_loader_worker_does_not_report_that_its_trainer_has_ended() -> None:
    loader = DataLoader(Reported(), batch_size=None, num_workers=1, worker_init_fn=watchdog.start_loader_worker)
    assert [bool(length) for length in loader] == [False, False, True]


def test_ranks_exchange_signals_before_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal after the exchange counts for the next step, on all ranks."""
    handler, control = PreemptionHandler(), TrainerControl()
    args: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    of_others = [0, signal.SIGTERM]
    exchanged: list[int] = []

    def any_rank(flags: torch.Tensor, device: torch.device) -> torch.Tensor:
        exchanged.append(int(flags))
        return flags.clamp(min=of_others.pop(0))

    monkeypatch.setattr(watchdog, "any_rank", any_rank)
    handler.share(args)
    handler._receive(signal.SIGUSR1, None)
    handler.on_step_end(args, TrainerState(), control)
    assert not control.should_save
    handler.share(args)
    handler.on_step_end(args, TrainerState(), control)
    assert control.should_save and exchanged == [0, signal.SIGUSR1] and handler.received == signal.SIGTERM


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that follows within moments: torchrun passes on what its ranks have got already."""
    ended: list[tuple[int, int]] = []
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(watchdog.signal, "signal", lambda *_: signal.SIG_DFL)
    monkeypatch.setattr(watchdog.os, "kill", lambda *args: ended.append(args))
    handler = PreemptionHandler()
    for later in (0.0, 0.1, REPEAT_SECONDS / 2):
        clock.now = 100.0 + later
        handler._receive(signal.SIGTERM, None)
    assert handler.received == signal.SIGTERM and ended == []
    clock.now += REPEAT_SECONDS
    handler._receive(signal.SIGTERM, None)
    assert ended == [(os.getpid(), signal.SIGTERM)]


def test_the_handlers_of_a_program_are_given_back(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in watchdog.SIGNALS]
    train(runs.flags(tiny_dirs, small_data, tmp_path / "run", 1, max_steps=1))
    assert [signal.getsignal(number) for number in watchdog.SIGNALS] == before
