"""Parameter groups: the projector at its own learning rate, with and without weight decay; optimizers refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.errors import CheckpointError, ConfigError
from llava.train import optimizer
from llava.train.estimate import read_recipe
from llava.train.train import train
from tests.train import runs

Dirs = dict[str, Path]
SCRIPTS = runs.ROOT / "scripts"


def test_groups_hold_each_trained_parameter_once() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "mm_projector": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    decayed = ["layer.weight", "mm_projector.weight", "frozen.weight"]
    groups = optimizer.parameter_groups(model.named_parameters(), decayed, 0.1, {"mm_projector_lr": 2e-5})
    assert [(group.get("lr"), group["weight_decay"]) for group in groups] == [
        *((None, 0.1), (None, 0.0), (2e-5, 0.1), (2e-5, 0.0))
    ]
    owners = ["layer.weight", "layer.bias", "mm_projector.weight", "mm_projector.bias"]
    parameters = dict(model.named_parameters())
    assert all(group["params"][0] is parameters[name] for group, name in zip(groups, owners))
    assert all(len(group["params"]) == 1 for group in groups)
    line = optimizer.describe_rates(groups, 2e-4)
    assert line == "Peak learning rates: 0.0002, 2e-05 for mm_projector (--mm_projector_lr)"


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str) -> float:
    return float((after[name] - before[name]).abs().max())


def rates(out: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["learning_rate"], line["mm_projector_lr"]) for line in lines if "loss" in line]


PROJECTOR = "model.mm_projector.0.weight"
RATES = {"learning_rate": 1e-3, "mm_projector_lr": 1e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0}


def test_the_projector_learns_at_its_own_rate(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first step of Adam moves every parameter that has a gradient by its learning rate."""
    out = tmp_path / "run"
    more = {"model_name_or_path": tiny_dirs["chat"], "max_steps": 1, "weight_decay": 0.0}
    train(runs.flags(tiny_dirs, small_data, out, 2, **more, **RATES))
    before, after = runs.tensors(tiny_dirs["chat"]), runs.tensors(out)
    assert moved(before, after, PROJECTOR) == pytest.approx(1e-4, rel=0.01)
    assert moved(before, after, "lm_head.weight") == pytest.approx(1e-3, rel=0.01)
    assert rates(out) == [(1e-3, 1e-4)]
    assert json.loads((out / "run.json").read_text())["arguments"]["training"]["mm_projector_lr"] == 1e-4
    assert "Peak learning rates: 0.001, 0.0001 for mm_projector (--mm_projector_lr)." in caplog.text


def test_both_rates_follow_the_schedule_and_are_resumed(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = {"lora_enable": True, "lora_r": 4, "learning_rate": 2e-3, "mm_projector_lr": 2e-4}
    argv = runs.flags(tiny_dirs, small_data, out, 2, **more, save_strategy="steps", save_steps=4)
    train(argv)
    logged, before = rates(out), runs.tensors(out)
    assert len({main for main, _ in logged}) == 8 and all(main == pytest.approx(10 * own) for main, own in logged)
    (out / "checkpoint-8" / "optimizer.pt").unlink()
    train(argv)
    assert rates(out) == logged and all(torch.equal(value, before[name]) for name, value in runs.tensors(out).items())
    position = argv.index("--mm_projector_lr")
    with pytest.raises(CheckpointError, match=r"--mm_projector_lr was 0.0002 in the run of .* and is None now"):
        train(argv[:position] + argv[position + 2 :])


@pytest.mark.slow
def test_the_projector_learns_at_its_own_rate_under_deepspeed(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = {"model_name_or_path": tiny_dirs["chat"], "max_steps": 1, "use_cpu": None, "weight_decay": 0.0}
    argv = runs.flags(tiny_dirs, small_data, out, 2, deepspeed=SCRIPTS / "zero3.json", **more, **RATES)
    runs.finish(argv, tmp_path / "log", ranks=2)
    before, after = runs.tensors(tiny_dirs["chat"]), runs.tensors(out)
    assert moved(before, after, PROJECTOR) == pytest.approx(1e-4, rel=0.01)
    assert moved(before, after, "lm_head.weight") == pytest.approx(1e-3, rel=0.01)
    assert rates(out) == [(1e-3, 1e-4)]


def test_the_estimate_takes_the_flag() -> None:
    assert read_recipe(SCRIPTS / "v1_5" / "finetune_lora.sh", 8, ["--mm_projector_lr", "1e-5"]).lora_r == 128


def test_an_optimizer_without_its_package_is_refused_before_anything_is_read(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    dirs = {"base": tmp_path / "nowhere", "tower": tmp_path / "nowhere"}
    for name, reason in (("adamw_bnb_8bit", "bnb is not installed"), ("adamw_apex_fused", "apex is not installed")):
        with pytest.raises(ConfigError, match=f"--optim {name} cannot be used: .*{reason}; install it") as caught:
            train(runs.flags(dirs, small_data, tmp_path / "run", 2, optim=name))
        assert "\n" not in str(caught.value)


def test_a_deepspeed_optimizer_would_ignore_the_rate(tmp_path: Path) -> None:
    args: Any = type("Args", (), {"optim": "sgd", "optim_args": None, "learning_rate": 1.0, "adam_beta1": 0.9})()
    args.adam_beta2, args.adam_epsilon, args.mm_projector_lr, args.deepspeed = 0.9, 1e-8, 1e-5, "zero3_offload.json"
    args.hf_deepspeed_config = type("Config", (), {"config": {"optimizer": {"type": "AdamW"}}})
    with pytest.raises(ConfigError, match=r"--mm_projector_lr has no effect on the optimizer of zero3_offload.json"):
        optimizer.check_optimizer(args)
