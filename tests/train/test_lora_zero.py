"""LoRA on two ranks under ZeRO-2 and ZeRO-3, in real processes: equal to one process, exact after SIGKILL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.train.train import train
from tests import tiny
from tests.train import runs
from tests.train.test_deepspeed import LOSS_ATOL, WEIGHT_ATOL, options

Dirs = dict[str, Path]


@pytest.fixture(scope="module")
def one_process(tiny_dirs: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same global batch by accumulation; not clipped, as the ZeRO files do not clip."""
    out = tmp_path_factory.mktemp("single") / "run"
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    train(runs.flags(tiny_dirs, small_data, out, 2, **LORA, **batch))
    return out


LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "max_steps": 10}


@pytest.mark.slow
def test_a_killed_qlora_run_resumes_exactly(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    """QLoRA under ZeRO-2; ZeRO-3 is refused."""
    base = tiny.make_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = {**options("zero2"), **LORA, "model_name_or_path": base, "bits": 4}
    runs.finish(runs.flags(tiny_dirs, small_data, whole, 2, **more), tmp_path / "log", ranks=2)
    argv = runs.flags(tiny_dirs, small_data, killed, 2, **more)
    runs.kill_at(argv, killed, 6, tmp_path / "log", ranks=2)
    runs.finish(argv, tmp_path / "log", ranks=2)
    assert "Resuming from" in (tmp_path / "log").read_text()
    runs.assert_equal_runs(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_equal_one_process_and_a_killed_run_resumes_exactly(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, one_process: Path, zero: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = {**options(zero), **LORA, "save_total_limit": None}
    runs.finish(runs.flags(tiny_dirs, small_data, whole, 2, **more), tmp_path / "log", ranks=2)
    assert runs.losses(whole) == pytest.approx(runs.losses(one_process), abs=LOSS_ATOL)
    runs.assert_equal_weights(whole, one_process, atol=WEIGHT_ATOL)

    argv = runs.flags(tiny_dirs, small_data, killed, 2, **more)
    runs.kill_at(argv, killed, 6, tmp_path / "log", ranks=2)
    runs.finish(argv, tmp_path / "log", ranks=2)
    assert "Resuming from" in (tmp_path / "log").read_text()
    runs.assert_equal_runs(whole, killed)
    for step in (4, 8):
        directory = whole / f"checkpoint-{step}"
        saved = {path.name for path in directory.iterdir()}
        assert {"adapter_config.json", "tokenizer.model", "latest", f"global_step{step}", "rng_state_1.pth"} <= saved
        _, model, _, _ = load_pretrained_model(directory, device="cpu")
        key = "model.mm_projector.0.weight"
        assert torch.equal(model.state_dict()[key], runs.tensors(directory)[f"base_model.model.{key}"])
    runs.assert_equal_weights(killed / "checkpoint-8", whole / "checkpoint-8")
    assert json.loads((whole / "run.json").read_text())["world_size"] == 2
