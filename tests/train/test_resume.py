"""A run that is killed with SIGKILL and resumed equals an uninterrupted one, also on another number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import CheckpointError, ConfigError
from llava.train.train import train
from tests.train import runs
from tests.train.test_deepspeed import LOSS_ATOL, WEIGHT_ATOL

Dirs = dict[str, Path]
EVERY = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "num_train_epochs": 2}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_is_exact(tiny_dirs: Dirs, small_data: Path, tmp_path: Path, stage: int) -> None:
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


def on_ranks(dirs: Dirs, data: Path, out: Path, ranks: int, **more: Any) -> list[str]:
    """A run of 16 steps of four records; the checkpoint in the middle of an epoch is kept."""
    saving = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // ranks}
    return runs.flags(dirs, data, out, 2, **batch, **saving, **more)


@pytest.fixture(scope="module")
def whole(tiny_dirs: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The output directory of an uninterrupted run on one or two ranks without DeepSpeed."""
    root = tmp_path_factory.mktemp("ranks")

    def run(ranks: int) -> Path:
        out = root / str(ranks)
        if not out.exists():
            runs.finish(on_ranks(tiny_dirs, small_data, out, ranks), root / f"{ranks}.log", ranks=ranks)
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1)])
def test_ranks_without_deepspeed_continue(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, whole: Callable[[int], Path], before: int, after: int
) -> None:
    source, out = whole(before), tmp_path / "run"
    shutil.copytree(source / "checkpoint-5", out / "checkpoint-5")
    shutil.copy(source / "run.json", out)
    runs.finish(on_ranks(tiny_dirs, small_data, out, after), tmp_path / "log", ranks=after)
    log = (tmp_path / "log").read_text()
    assert f"Resuming from {out / 'checkpoint-5'}" in log
    line = f"Resuming on {after} processes instead of {before}: each step takes the same records"
    assert log.count(line) == (before != after)
    if before == after:
        runs.assert_equal_runs(source, out)
    assert runs.losses(out) == pytest.approx(runs.losses(source), abs=LOSS_ATOL)
    for key in ("learning_rate", "supervised_tokens"):
        assert [entry[key] for entry in runs.history(out)] == [entry[key] for entry in runs.history(source)]
    runs.assert_equal_weights(out, source, atol=WEIGHT_ATOL)


def test_what_a_run_cannot_resume_with_is_refused_in_one_sentence(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    argv = runs.flags(tiny_dirs, small_data, out, 1, save_strategy="steps", save_steps=4)
    train(argv)
    assert "finished run" not in caplog.text
    before = (out / "run.json").read_text()
    with pytest.raises(CheckpointError, match=r"run with --global_batch_size 4, but this run has 8; pass --global"):
        train([*argv, "--global_batch_size", "8"])
    for flag in ("--max_steps", "--num_train_epochs"):
        with pytest.raises(ConfigError, match=r"checkpoint-8 has done 8 steps, but this run ends after [14]; raise"):
            train([*argv, flag, {"--max_steps": "1", "--num_train_epochs": "0.5"}[flag]])
    with pytest.raises(CheckpointError, match="must be a checkpoint directory, got latest"):
        train([*argv, "--resume_from_checkpoint", "latest"])
    assert json.loads(before)["steps"] == 8 and (out / "run.json").read_text() == before
    weights = runs.tensors(out)
    train(argv)
    assert f"{out} holds a finished run of 8 steps; this one only writes its final weights again." in caplog.text
    assert all(torch.equal(value, weights[name]) for name, value in runs.tensors(out).items())
    shutil.rmtree(out / "checkpoint-8")
    train(argv)
    assert f"{out} holds a finished run of 8 steps; this one trains steps 5 to 8." in caplog.text
    assert all(torch.equal(value, weights[name]) for name, value in runs.tensors(out).items())


def test_the_flag_chooses_how_a_resumed_optimizer_steps(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = runs.flags(tiny_dirs, small_data, out, 1, save_strategy="steps", save_steps=4)

    def is_fused() -> list[bool]:
        state = torch.load(out / "checkpoint-8" / "optimizer.pt", weights_only=True)
        return [bool(group["fused"]) for group in state["param_groups"]]

    train([*argv, "--optim", "adamw_torch"])
    assert not any(is_fused())
    shutil.rmtree(out / "checkpoint-8")
    train(argv)
    assert all(is_fused())


@pytest.mark.parametrize("given", ["True", "False", "checkpoint-4"])
def test_the_forms_of_resume_from_checkpoint(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    out = tmp_path / "run"
    argv = runs.flags(tiny_dirs, small_data, out, 1, save_strategy="steps", save_steps=4, max_steps=6)
    train(argv)
    losses = runs.losses(out)
    caplog.clear()
    train([*argv, "--resume_from_checkpoint", str(out / given) if "-" in given else given])
    newest = {"True": "checkpoint-4", "checkpoint-4": "checkpoint-4", "False": None}[given]
    assert (f"Resuming from {out / str(newest)}" in caplog.text) == (newest is not None)
    assert runs.losses(out) == losses
