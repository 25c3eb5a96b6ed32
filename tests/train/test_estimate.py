"""Estimate: published hours, known memory, a measured run, and suggestions when a run does not fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.errors import TrainingError
from llava.train import estimate
from llava.train import estimate_inputs as inputs
from llava.train import train as program
from llava.train.flops import Shape, Trainable, device_peak, step_flops
from tests.test_package import ROOT, plain_environment
from tests.train import runs

SEVEN = Shape(4096, 11008, 32, 32, 32, 32000, 1024, 4096, 23, 577, 576)


def published(stage: str, size: str) -> tuple[estimate.RunConfig, float]:
    """A run of LLaVA-1.5 on eight A100s, and its hours at 100 % MFU."""
    recipe = ROOT / "scripts" / "v1_5" / f"{stage}.sh"
    flags = estimate.read_recipe(recipe, 8, ["--model_name_or_path", f"lmsys/vicuna-{size}-v1.5"])
    data = inputs.dataset_stats(flags)
    run = estimate.run_config(flags, 8, data)
    assert estimate.required_bytes(estimate.worst_case(run, data, flags.model_max_length)) < 80e9  # it did fit
    return run, estimate.training_hours(run, data.samples, 1, inputs.gpu_peak("A100"), 1.0)


@pytest.mark.parametrize(("stage", "known", "unseen"), [("pretrain", 5.5, 3.5), ("finetune", 20, 10)])
def test_mfu_fitted_to_13b_predicts_hours_of_7b(stage: str, known: float, unseen: float) -> None:
    """The MFU of each stage is fitted to the published 13B run; the hours of 7B are a prediction."""
    run, at_peak = published(stage, "13b")
    assert estimate.MFU[run.zero_stage] == pytest.approx(at_peak / known, rel=0.005)
    smaller, at_peak = published(stage, "7b")
    assert smaller.zero_stage == run.zero_stage
    assert at_peak / estimate.MFU[smaller.zero_stage] == pytest.approx(unseen, rel=0.25)


def test_sizes_of_known_models() -> None:
    assert SEVEN.language_weights == 6_738_415_616  # LLaMA-7B's published count
    assert Shape(5120, 13824, 40, 40, 40, 32000).language_weights == 13_015_864_320
    assert SEVEN.projector_weights == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert SEVEN.tower_weights == pytest.approx(291e6, rel=0.02)  # 23 of the 24 layers of 304 M
    assert device_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak("Intel") is None


def test_memory_follows_zero() -> None:
    """Sixteen bytes per parameter (arXiv:1910.02054, figure 1), and two for gradients in float32, sharded by stage."""
    run = estimate.RunConfig(
        Shape(4096, 11008, 32, 32, 32, 32000), Trainable(projector=False), 1, 100, 0, deepspeed=True, gpus=64
    )
    count = run.shape.language_weights
    for stage, wanted in ((0, 18), (1, 6 + 12 / 64), (2, 2 + 16 / 64)):
        staged = estimate.replace(run, zero_stage=stage)
        parts = estimate.memory_breakdown(staged)
        assert parts["weights"] + parts["gradients"] + parts["optimizer"] == pytest.approx(wanted * count)
    three = estimate.memory_breakdown(estimate.replace(run, zero_stage=3))
    assert three["weights"] == pytest.approx(2 * count / 64 + 2 * estimate.MAX_LIVE_PARAMETERS)
    assert estimate.gradient_bytes(estimate.replace(run, zero_stage=3, offload=True)) == 0  # they are on the host
    packed = estimate.weight_bytes(estimate.replace(run, bits=4, trainable=Trainable(adapters=10**7)))
    assert packed < 0.35 * 2 * count


def test_a_budget_of_tokens_bounds_the_micro_batch(
    tiny_dirs: dict[str, Path], small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory of a full micro-batch, and the report of packing where data and tokenizer are on this disk."""
    recipe = str(ROOT / "scripts" / "v1_5" / "finetune.sh")
    flags = estimate.read_recipe(Path(recipe), 8, ["--micro_batch_tokens", "4096"])
    data = inputs.dataset_stats(flags)
    run = estimate.run_config(flags, 8, data)
    assert run.positions <= 4096 and run.accumulation_steps * run.gpus * run.batch_size == pytest.approx(128)
    assert estimate.worst_case(run, data, 2048).positions == pytest.approx(4096)
    short = estimate.with_budget(run, 1000, 128)
    assert estimate.worst_case(short, data, 2048).positions == 2048 + 576  # the longest row, by itself
    packed, plain = (estimate.required_bytes(estimate.worst_case(r, data, 2048)) for r in (run, run_without(flags)))
    assert packed < plain
    assert estimate.smaller_settings(flags, run)[0] == "--micro_batch_tokens 2048"
    argv = [
        recipe,
        "--gpus",
        "2",
        "--model_name_or_path",
        str(tiny_dirs["base"]),
        "--data_path",
        str(small_data / "finetune.json"),
    ]
    argv += ["--vision_tower", str(tiny_dirs["tower"]), "--global_batch_size", "16", "--loss_group_size", "8"]
    assert estimate.main([*argv, "--micro_batch_tokens", "4000"]) == 0
    output = capsys.readouterr().out
    assert "samples in up to 4000 tokens x" in output and "= global batch 16" in output
    assert "fill of the budget" in output and re.search("packed in 4000 tokens +8 consecutive rows", output)


def run_without(flags: inputs.RecipeFlags) -> estimate.RunConfig:
    """The run of the flags without packing."""
    return estimate.run_config(estimate.replace(flags, micro_batch_tokens=None), 8, inputs.dataset_stats(flags))


def test_flops_are_two_per_weight_and_six_if_trained() -> None:
    few = {"tokens": 1e6, "length": 1, "images": 0, "supervised": 1e6}
    weights = SEVEN.layers * SEVEN.layer_weights + SEVEN.vocabulary * SEVEN.hidden
    assert step_flops(SEVEN, Trainable(), **few) == pytest.approx(6 * weights * 1e6, rel=1e-3)
    assert step_flops(SEVEN, Trainable(language=False), **few) == pytest.approx(4 * weights * 1e6, rel=1e-3)


def test_the_command_and_its_advice(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "scripts_internvl" / "finetune_internvit6b_224to336_vicuna7b.sh")
    assert estimate.main([recipe]) == 0
    output = capsys.readouterr().out
    assert "8 GPUs x 16 samples x 1 accumulation steps = global batch 128; ZeRO stage 3" in output
    assert "It fits 80 GB." in output
    assert estimate.main([recipe, "--gpus", "1", "--gpu-memory", "24"]) == 1
    output = capsys.readouterr().out
    assert (
        "does not fit 24 GB" in output
        and "BATCH=8" in output
        and "zero3_offload.json" in output
        and "--lora_enable" in output
    )
    small = [
        "--lora_enable",
        "True",
        "--bits",
        "4",
        "--deepspeed",
        "./scripts/zero2.json",
        "--per_device_train_batch_size",
        "1",
    ]
    assert estimate.main([recipe, "--gpus", "1", "--gpu-memory", "24", *small]) == 0
    assert estimate.main([recipe, "--gpus", "64"]) == 0
    custom = str(ROOT / "scripts_internvl" / "finetune_internvit6b_224to336_vicuna13b_custom_data.sh")
    capsys.readouterr()
    assert estimate.main([custom, "--gpus", "128"]) in (0, 1)
    assert "128 GPUs x 2 samples x 2 accumulation steps = global batch 512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["nowhere.sh"], "Recipe nowhere.sh does not exist"),
        (["scripts/v1_5/finetune.sh", "--gpus", "12"], "multiple of 8"),
        (["scripts/v1_5/finetune.sh", "--gpus", "136"], "There are more GPUs (136) than samples per step (128)"),
        (["scripts/v1_5/finetune.sh", "--gpu", "abacus"], "--gpu must be one of A100"),
        (["scripts/v1_5/finetune.sh", "--model_name_or_path", "nobody/model"], "give its directory"),
        (["scripts/v1_5/finetune.sh", "--gpus", "0"], "--gpus must be at least 1"),
        (["scripts/v1_5/finetune.sh", "--mfu", "40"], "--mfu must be above 0 and at most 1, got 40"),
        (["scripts/zero2.json"], "is not a training recipe"),
        (["scripts_internvl/_common.sh"], "is not a training recipe"),
        (["scripts_internvl/eval/pope.sh"], "cannot be run"),
        (["scripts/v1_5/finetune.sh", "--deepspeed", "LICENSE"], "cannot be read as JSON"),
    ],
)
def test_errors_are_one_sentence(
    argv: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert estimate.main(argv) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "given", "why"),
    [
        ("model_name_or_path", "tower", "its config.json has no vocab_size"),
        ("vision_tower", "base", "is of type 'llama', which is not one of clip"),
    ],
)
def test_wrong_kind_of_directory_is_an_error(
    tiny_dirs: dict[str, Path], flag: str, given: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estimate.main([str(ROOT / "scripts/v1_5/pretrain.sh"), f"--{flag}", str(tiny_dirs[given])]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [("echo hello  # _common.sh", "prints no training command"), (": > started", "is not a training recipe")],
)
def test_other_scripts_are_refused_and_not_run(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could start a training run, as scripts_internvl/quickstart.sh does."""
    monkeypatch.chdir(tmp_path)
    Path("a.sh").write_text(text)
    assert estimate.main(["a.sh"]) == 2
    assert why in capsys.readouterr().err
    assert not Path("started").exists()


def test_out_of_memory_error_suggests_smaller_settings(
    tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(program, "run", full)
    with pytest.raises(TrainingError, match=r"out of memory. The longest batch needs about \d+ GiB.*BATCH=2.*; .*; "):
        program.train(runs.flags(tiny_dirs, small_data, tmp_path, 2))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_measured_run_is_within_fifteen_per_cent() -> None:
    """One configuration; `python -m benchmarks.memory` measures all of them."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "full, deeper, small vocabulary"]
    environment = {**plain_environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
