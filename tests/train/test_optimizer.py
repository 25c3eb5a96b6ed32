"""Parameter groups: rates by part and layer, with and without weight decay; 8-bit AdamW; optimizers refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.arguments import parse_arguments
from llava.errors import CheckpointError, ConfigError
from llava.train import optimizer
from llava.train.estimate import read_recipe
from llava.train.train import prepare, run, train
from tests.train import runs

Dirs = dict[str, Path]
SCRIPTS = runs.ROOT / "scripts"


def test_groups_hold_each_trained_parameter_once() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "mm_projector": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    decayed = ["layer.weight", "mm_projector.weight", "frozen.weight"]
    rates = {"mm_projector_lr": 2e-5}
    groups = optimizer.parameter_groups(model.named_parameters(), decayed, 0.1, 2e-4, rates)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        *((2e-4, 0.1), (2e-4, 0.0), (2e-5, 0.1), (2e-5, 0.0))
    ]
    owners = ["layer.weight", "layer.bias", "mm_projector.weight", "mm_projector.bias"]
    parameters = dict(model.named_parameters())
    assert all(group["params"][0] is parameters[name] for group, name in zip(groups, owners))
    assert all(len(group["params"]) == 1 for group in groups)
    line = optimizer.describe_rates(2e-4, rates)
    assert line == "Peak learning rates: 0.0002, 2e-05 for mm_projector (--mm_projector_lr)"
    for flag in ("mm_vision_tower_lr", "mm_vision_layer_decay"):
        with pytest.raises(ConfigError, match=f"--{flag} has no effect, because nothing of that part is trained"):
            optimizer.parameter_groups(model.named_parameters(), decayed, 0.1, 2e-4, {flag: 0.5})


DECAYS = {"mm_projector_lr": 1e-4, "mm_vision_tower_lr": 1e-2, "mm_vision_layer_decay": 0.5, "llm_layer_decay": 0.8}
# Layers that a parameter is below the last one of its part: the tower runs 3 layers, the language model has 2.
TOWER = "model.vision_tower.vision_tower."
BELOW = {
    "model.embed_tokens.weight": 2,
    "model.layers.0.mlp.up_proj.weight": 1,
    "model.layers.1.self_attn.q_proj.weight": 0,
    "model.norm.weight": 0,
    "lm_head.weight": 0,
    "model.mm_projector.0.weight": 0,
    f"{TOWER}embeddings.position_embedding": 3,
    f"{TOWER}encoder.layers.0.mlp.fc1.weight": 2,
    f"{TOWER}encoder.layers.2.ls1": 0,
}


def expected_rate(name: str, learning_rate: float, rates: dict[str, float]) -> float:
    if "mm_projector" in name:
        return rates.get("mm_projector_lr", learning_rate)
    if "vision_tower" in name:
        decay = rates.get("mm_vision_layer_decay", 1.0)
        return rates.get("mm_vision_tower_lr", learning_rate) * decay ** BELOW[name]
    return learning_rate * rates.get("llm_layer_decay", 1.0) ** BELOW[name]


@pytest.fixture(scope="module")
def whole(tiny_dirs: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of which everything is trained."""
    more = {"unfreeze_mm_vision_tower": True}
    argv = runs.flags(tiny_dirs, small_data, tmp_path_factory.mktemp("whole"), 2, **more)
    return prepare(*parse_arguments(argv))[0]


@pytest.mark.parametrize("flags", [DECAYS, *({flag: value} for flag, value in DECAYS.items())])
def test_rates_by_part_and_layer(whole: Any, flags: dict[str, float]) -> None:
    decayed = {name for name, _ in whole.named_parameters() if name.endswith("weight")}
    groups = optimizer.parameter_groups(whole.named_parameters(), decayed, 0.1, 1e-3, flags)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(whole.parameters()))
    for name in BELOW:
        group = found[id(whole.get_parameter(name))]
        assert group["lr"] == pytest.approx(expected_rate(name, 1e-3, flags)), name
        assert group["weight_decay"] == (0.1 if name in decayed else 0.0)
    assert groups[0]["lr"] == 1e-3  # the rate that is logged
    logged = {flag: groups[index]["lr"] for flag, index in optimizer.logged_groups(groups).items()}
    assert logged == {flag: value for flag, value in flags.items() if flag.endswith("_lr")}


def test_rates_are_described_in_one_line() -> None:
    assert optimizer.describe_rates(1e-3, DECAYS) == (
        "Peak learning rates: 0.001, times 0.8 for each layer below the last (--llm_layer_decay), 0.0001 for "
        "mm_projector (--mm_projector_lr), 0.01 for vision_tower (--mm_vision_tower_lr), times 0.5 for each layer "
        "below the last (--mm_vision_layer_decay)"
    )


def test_layers_of_other_models() -> None:
    """Parameters before the numbered layers are the lowest, those after them the highest."""
    mpt = ["transformer.wte.weight", "transformer.blocks.0.ffn.up_proj.weight", "transformer.norm_f.weight"]
    assert optimizer.layers_above(mpt) == dict(zip(mpt, (1, 0, 0)))
    timm = ["t.cls_token", "t.patch_embed.proj.weight", "t.blocks.0.norm1.weight", "t.blocks.11.attn.qkv.lora_A.weight"]
    assert optimizer.layers_above(timm) == dict(zip(timm, (12, 12, 11, 0)))
    assert optimizer.layers_above(["score.weight"]) == {"score.weight": 0}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str) -> float:
    return float((after[name] - before[name]).abs().max())


def rates(out: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["learning_rate"], line["mm_projector_lr"]) for line in lines if "loss" in line]


RATES = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0, **DECAYS}
WHOLE = {**RATES, "max_steps": 1, "weight_decay": 0.0, "unfreeze_mm_vision_tower": True}


def check_first_step(chat: Path, out: Path, tower: Path) -> None:
    """The first step of Adam moves every parameter that has a gradient by its learning rate."""
    before = runs.tensors(chat) | {TOWER + name: value for name, value in runs.tensors(tower).items()}
    after = runs.tensors(out)
    for name in BELOW:
        assert moved(before, after, name) == pytest.approx(expected_rate(name, 1e-3, DECAYS), rel=0.01), name
    assert rates(out) == [(1e-3, 1e-4)]
    line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert line["mm_vision_tower_lr"] == 1e-2


def test_parts_and_layers_learn_at_their_rates(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 2, **WHOLE, model_name_or_path=tiny_dirs["chat"]))
    check_first_step(tiny_dirs["chat"], out, tiny_dirs["tower"])
    saved = json.loads((out / "run.json").read_text())["arguments"]["training"]
    assert {flag: saved[flag] for flag in DECAYS} == DECAYS
    assert f"{optimizer.describe_rates(1e-3, DECAYS)}." in caplog.text


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
    with pytest.raises(CheckpointError, match=r"--llm_layer_decay was None in the run of .* and is 0.9 now"):
        train([*argv, "--llm_layer_decay", "0.9"])


def test_layer_wise_rates_are_resumed(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = {**DECAYS, "unfreeze_mm_vision_tower": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    argv = runs.flags(tiny_dirs, small_data, out, 2, **more)
    train(argv)
    logged, before = rates(out), runs.tensors(out)
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    train(argv)
    assert rates(out) == logged and all(torch.equal(value, before[name]) for name, value in runs.tensors(out).items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_parts_and_layers_learn_at_their_rates_under_deepspeed(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, zero: str
) -> None:
    out = tmp_path / "run"
    more = {**WHOLE, "model_name_or_path": tiny_dirs["chat"], "use_cpu": None, "deepspeed": SCRIPTS / f"{zero}.json"}
    runs.finish(runs.flags(tiny_dirs, small_data, out, 2, **more), tmp_path / "log", ranks=2)
    check_first_step(tiny_dirs["chat"], out, tiny_dirs["tower"])


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


# --- 8-bit AdamW of bitsandbytes --------------------------------------------------------------------------------------

EIGHT_BIT = {
    "learning_rate": 2e-3,
    "unfreeze_mm_vision_tower": True,
    "mm_vision_tower_lr": 1e-3,
    "llm_layer_decay": 0.9,
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_learns_like_adamw_and_resumes_exactly(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, name: str
) -> None:
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "8", 2, **EIGHT_BIT, optim=name, save_strategy="steps",
                      save_steps=4)  # fmt: skip
    trainer = run(*parse_arguments(argv))
    states = {name: trainer.optimizer.state[p] for name, p in trainer.model.named_parameters() if p.requires_grad}
    bits = {name: state["state1"].dtype for name, state in states.items()}
    assert bits["model.layers.0.mlp.up_proj.weight"] is torch.uint8
    assert bits["model.embed_tokens.weight"] is torch.float32 and bits["lm_head.weight"] is torch.uint8
    assert bits["model.norm.weight"] is torch.float32  # less than 4,096 numbers
    train(runs.flags(tiny_dirs, small_data, tmp_path / "32", 2, **EIGHT_BIT))
    losses = runs.losses(tmp_path / "8")
    assert losses == pytest.approx(runs.losses(tmp_path / "32"), abs=0.02)
    assert losses[-1] < losses[0] - 0.2
    before = runs.tensors(tmp_path / "8")
    (tmp_path / "8" / "checkpoint-8" / "optimizer.pt").unlink()
    train(argv)
    assert runs.losses(tmp_path / "8") == losses
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(tmp_path / "8").items())
