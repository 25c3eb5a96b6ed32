"""A run killed with SIGKILL and started again equals one that was never interrupted (users.md SAVE-2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import runs

EVERY = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "num_train_epochs": 2}
SCRIPTS = runs.ROOT / "scripts"


def compare(
    tiny_dirs: dict[str, Path], data: Path, root: Path, stage: int, ranks: int, **more: Any
) -> tuple[Path, Path]:
    """Run once through and once killed at step 5 of 16, resumed; returns both output directories, found equal."""
    whole, killed = root / "whole", root / "killed"
    options = {**EVERY, **more}
    runs.finish(runs.flags(tiny_dirs, data, whole, stage, **options), root / "whole.log", ranks)
    argv = runs.flags(tiny_dirs, data, killed, stage, **options)
    runs.kill_at(argv, killed, 5, root / "killed.log", ranks)
    runs.finish(argv, root / "killed.log", ranks)
    assert "Going on from" in (root / "killed.log").read_text()
    assert len(runs.losses(whole)) == (8 if "gradient_accumulation_steps" in more else 16)
    assert runs.losses(killed) == runs.losses(whole)
    for key in ("learning_rate", "supervised_tokens"):
        assert [entry[key] for entry in runs.history(killed)] == [entry[key] for entry in runs.history(whole)]
    runs.assert_equal_weights(whole, killed)
    kept = sorted(path.name for path in killed.glob("*checkpoint-*"))
    assert len(kept) == 2 and not any(name.startswith("tmp") for name in kept)
    return whole, killed


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_is_exact(tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path, stage: int) -> None:
    more: dict[str, Any] = {} if stage == 1 else {"group_by_modality_length": True, "per_device_train_batch_size": 4}
    compare(tiny_dirs, small_data, tmp_path, stage, 1, **more)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "zero"), [(1, "zero3"), (2, "zero2")])
def test_two_ranks_under_deepspeed_are_exact(
    tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path, stage: int, zero: str
) -> None:
    deepspeed = {"deepspeed": SCRIPTS / f"{zero}.json", "use_cpu": None, "per_device_train_batch_size": 2}
    _, killed = compare(tiny_dirs, small_data, tmp_path, stage, 2, **deepspeed)
    saved = {path.name for path in (killed / "checkpoint-16").iterdir()}
    assert {"config.json", "trainer_state.json", "latest", "global_step16", "rng_state_1.pth"} <= saved
    assert ("mm_projector.bin" in saved) == (stage == 1)
    assert ("model.safetensors" in saved) == (stage == 2)
