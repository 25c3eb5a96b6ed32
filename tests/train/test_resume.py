"""A run that is killed with SIGKILL and resumed equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.train.train import train
from tests.train import runs

EVERY = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "num_train_epochs": 2}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_is_exact(tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path, stage: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options: dict[str, Any] = EVERY if stage == 1 else {**EVERY, "group_by_modality_length": True}
    train(runs.flags(tiny_dirs, small_data, whole, stage, **options))
    argv = runs.flags(tiny_dirs, small_data, killed, stage, **options)
    runs.kill_at(argv, killed, 5, tmp_path / "log")
    assert not (killed / "trainer_state.json").exists()
    runs.finish(argv, tmp_path / "log")
    output = (tmp_path / "log").read_text()
    assert "Resuming from" in output and "Resuming with" not in output
    assert len(runs.losses(whole)) == 16
    runs.assert_equal_runs(whole, killed)
    assert sorted(path.name for path in killed.glob("*checkpoint-*")) == ["checkpoint-14", "checkpoint-16"]
