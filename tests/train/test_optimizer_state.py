"""Which optimizer states are converted to other hardware, and what is refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.train import checkpointing, optimizer_state
from llava.train.llava_trainer import LLaVATrainer
from llava.train.optimizer_state import Layout

SHAPES = {"a": torch.Size([3]), "b": torch.Size([2, 2])}


def no_weights() -> Iterable[tuple[str, Tensor]]:
    return []


def moments(*sizes: int) -> dict[int, dict[str, Any]]:
    """States of flat parameters, which count up in `exp_avg`."""
    return {i: {"step": 3, "exp_avg": torch.arange(float(n)), "exp_avg_sq": torch.ones(n)} for i, n in enumerate(sizes)}


def make_plain(directory: Path, state: dict[int, dict[str, Any]] | None = None) -> Path:
    groups = [{"params": [0], "lr": 0.1, "weight_decay": 0.2}, {"params": []}, {"params": [1], "lr": 0.1}]
    torch.save({"state": moments(3, 4) if state is None else state, "param_groups": groups}, directory / "optimizer.pt")
    torch.save({}, directory / "scheduler.pt")
    for rank in range(3):
        torch.save({}, directory / f"rng_state_{rank}.pth")
    return directory


def make_zero(directory: Path, stage: int, ranks: int = 2, **more: Any) -> Path:
    """A DeepSpeed checkpoint with the parameters of `SHAPES`, 7 values, in one group."""
    folder = directory / "global_step3"
    folder.mkdir()
    (directory / "latest").write_text(folder.name)
    torch.save({}, directory / "scheduler.pt")
    counters = dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), 3)
    model = {"param_shapes": [SHAPES], "lr_scheduler": None, **counters}
    torch.save(model, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(ranks if stage else 0):
        base = {"state": moments(4), "param_groups": [{"params": [0], "lr": 0.1}]}
        base["state"][0]["exp_avg"] += 10 * rank
        flat = [torch.arange(4.0) + 10 * rank]
        keys = (
            ("optimizer_state_dict", "fp32_flat_groups")
            if stage == 3
            else ("base_optimizer_state", "single_partition_of_fp32_groups")
        )
        state = {"zero_stage": stage, "partition_count": ranks, **dict(zip(keys, (base, flat))), **more}
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return directory


def flags(stage: int | None, ranks: int, optim: str = "adamw_torch", **config: Any) -> Any:
    config = {"zero_optimization": {"stage": stage, **config.pop("zero", {})}, **config}
    file = "file.json" if stage is not None else None
    return SimpleNamespace(
        deepspeed=file, hf_deepspeed_config=SimpleNamespace(config=config), optim=optim, world_size=ranks
    )


@pytest.mark.parametrize(
    ("found", "args", "why"),
    [
        (None, flags(None, 8, "sgd"), None),
        (2, flags(2, 2, "sgd"), None),
        (1, flags(2, 2, "sgd"), None),
        (3, flags(3, 2, "sgd"), None),
        (2, flags(3, 4), None),
        (3, flags(None, 1, "adamw_torch_fused"), None),
        (None, flags(2, 2, optimizer={"type": "AdamW"}), None),
        (
            2,
            flags(2, 4, "sgd"),
            "under ZeRO-2 on 2 processes, but this run is under ZeRO-2 on 4 .* optimizer sgd is not",
        ),
        (
            None,
            flags(3, 1, "adafactor"),
            "without DeepSpeed on 3 .* this run is under ZeRO-3 on 1 process: .* adafactor",
        ),
        (
            2,
            flags(None, 1, "adamw_bnb_8bit"),
            "adamw_bnb_8bit is not converted, only that of adamw_torch. Resume it as",
        ),
        (2, flags(3, 2, optimizer={"type": "OneBitAdam"}), "optimizer OneBitAdam is not converted"),
        (2, flags(3, 2, scheduler={}), 'file.json follows the "scheduler" entry of a ZeRO file'),
        (2, flags(3, 2, zero={"offload_optimizer": {"device": "nvme"}}), "file.json offloads to NVMe"),
        (2, flags(0, 2), "this run is under DeepSpeed without ZeRO on 2 .* only ZeRO stages 1 to 3"),
        (0, flags(2, 2), "is from a run under DeepSpeed without ZeRO"),
    ],
)
def test_what_is_converted(tmp_path: Path, found: int | None, args: Any, why: str | None) -> None:
    checkpoint = make_plain(tmp_path) if found is None else make_zero(tmp_path, found)
    if why is None:
        optimizer_state.check_conversion(checkpoint, args)
        return
    with pytest.raises(CheckpointError, match=why):
        optimizer_state.check_conversion(checkpoint, args)


def test_a_schedule_of_a_zero_file_is_not_exchanged(tmp_path: Path) -> None:
    (make_zero(tmp_path, 3) / "scheduler.pt").unlink()
    optimizer_state.check_conversion(tmp_path, flags(3, 4, scheduler={}))
    with pytest.raises(CheckpointError, match='learning rate of that run follows the "scheduler" entry'):
        optimizer_state.check_conversion(tmp_path, flags(None, 4))


def test_parameters_are_put_together_from_shards(tmp_path: Path) -> None:
    """ZeRO-2 cuts all values in two, here after 4 with one of padding at the end; ZeRO-3 cuts and pads each tensor."""
    flat = [0.0, 1, 2, 3, 10, 11, 12, 13]
    expected = {2: (flat[:3], flat[3:7]), 3: ([0.0, 1, 10], [2.0, 3, 12, 13])}
    for stage, (a, b) in expected.items():
        (tmp_path / str(stage)).mkdir()
        saved = optimizer_state.read(make_zero(tmp_path / str(stage), stage), [["a", "b"]], no_weights)
        assert saved.layout == Layout(stage, 2) and saved.step == 3 and saved.groups[0].settings == {"lr": 0.1}
        weights = dict(saved.weights())
        assert weights["a"].tolist() == a and weights["b"].flatten().tolist() == b and weights["b"].shape == (2, 2)
        assert torch.equal(saved.moment("b", "exp_avg", (2, 2)), weights["b"])
        assert saved.moment("a", "exp_avg_sq", (3,)).tolist() == [1, 1, 1]
        saved.check_groups([[], ["a", "b"]])
        with pytest.raises(CheckpointError, match=r"has 1 parameter groups \(2 parameters\) .* other ones \(1, 1\)"):
            saved.check_groups([["a"], ["b"]])
    gaps = make_zero(tmp_path, 1, param_alignment_paddings=[[1, 0]])
    assert dict(optimizer_state.read(gaps, [], no_weights).weights())["b"].flatten().tolist() == flat[4:]


def test_parameters_without_deepspeed_are_named_by_their_place(tmp_path: Path) -> None:
    """A parameter that never had a gradient has no state, and continues with zeros."""
    torch.save({"scale": 8.0}, make_plain(tmp_path, {1: moments(3, 4)[1]}) / "scaler.pt")
    saved = optimizer_state.read(tmp_path, [["a"], ["b"]], no_weights)
    saved.check_groups([["a"], ["b"]])
    assert saved.layout == Layout(None, 3) and (saved.step, saved.loss_scale) == (3, 8.0)
    assert saved.moment("b", "exp_avg", (2, 2)).tolist() == [[0, 1], [2, 3]]
    assert saved.moment("a", "exp_avg", (3,)).tolist() == [0, 0, 0]
    assert saved.groups[0].settings == {"lr": 0.1, "weight_decay": 0.2}
    with pytest.raises(CheckpointError, match=r"2 parameter groups \(1, 1 parameters\)"):
        optimizer_state.read(tmp_path, [["a", "b"]], no_weights).check_groups([["a", "b"]])


def test_states_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    make_plain(tmp_path, {0: {"momentum_buffer": torch.ones(3)}})
    with pytest.raises(CheckpointError, match=r"another optimizer than AdamW \(momentum_buffer\)"):
        optimizer_state.read(tmp_path, [["a"], ["b"]], no_weights)
    for name in ("missing", "code"):
        (tmp_path / name).mkdir()
    shards = sorted(make_zero(tmp_path / "missing", 2).glob("*/*optim_states.pt"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="has 1 optimizer shards and needs 2"):
        optimizer_state.read(tmp_path / "missing", [], no_weights)
    make_zero(tmp_path / "code", 2, loss_scaler=os.system)
    with pytest.raises(CheckpointError, match="damaged, or would run code"):
        optimizer_state.read(tmp_path / "code", [], no_weights)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    named = {"a": nn.Parameter(torch.zeros(3))}
    for weights, why in (
        ({"b": torch.ones(3)}, r"b is \(3,\) in the checkpoint, but not trained in this run"),
        ({"a": torch.ones(4)}, r"a is \(4,\) in the checkpoint, but \(3,\) in this run"),
        ({}, "no trained weights of a"),
    ):
        saved = optimizer_state.SavedState(Layout(2, 2), weights.items, named)
        with pytest.raises(CheckpointError, match=why):
            optimizer_state.to_optimizer(saved, torch.optim.AdamW(named.values()))


def test_random_state_is_of_this_rank_or_the_first(tmp_path: Path) -> None:
    values = {}
    for rank in (1, 2):  # of a node with its own disk
        torch.manual_seed(rank)
        torch.save(checkpointing.random_state(), tmp_path / f"rng_state_{rank}.pth")
        values[rank] = float(torch.rand(()))
    for rank, source in ((2, 2), (5, 1)):
        trainer: Any = SimpleNamespace(_rng_file=lambda directory, rank=rank: tmp_path / f"rng_state_{rank}.pth")
        LLaVATrainer._load_rng_state(trainer, str(tmp_path))
        assert float(torch.rand(())) == values[source]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no random state"):
        LLaVATrainer._load_rng_state(trainer, str(tmp_path / "empty"))


def test_the_gradient_scaler_continues(tmp_path: Path) -> None:
    """Without DeepSpeed, --fp16 needs CUDA; the scaler is the same on the CPU."""
    parameter = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(parameter.sum()).backward()

    def trainer(scaler: torch.amp.GradScaler) -> Any:
        made = LLaVATrainer.__new__(LLaVATrainer)
        made.args = SimpleNamespace(should_save=True, world_size=1, device=torch.device("cpu"))
        made.accelerator = SimpleNamespace(scaler=scaler)
        made.optimizer = torch.optim.AdamW([parameter])
        made.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda step: 1.0)
        made.is_deepspeed_enabled = made.is_fsdp_enabled = False
        return made

    trainer(scaler)._save_optimizer_and_scheduler(str(tmp_path))
    fresh = torch.amp.GradScaler("cpu")
    trainer(fresh)._load_optimizer_and_scheduler(str(tmp_path))
    assert fresh.get_scale() == 2.0**10
    assert optimizer_state.read(tmp_path, [["a"]], no_weights).loss_scale == 2.0**10
