"""Optimizer state of a checkpoint on other hardware: another number of ranks, another ZeRO stage, or no DeepSpeed.

A checkpoint keeps the files that its run wrote: `optimizer.pt`, or one shard a rank under ZeRO. Resuming on the same
hardware loads them as they are. Elsewhere they are mapped into memory, and float32 weight and moments of one parameter
at a time are put together from the shards of all ranks and copied to where this run keeps them. (DeepSpeed's universal
checkpoints would need a second copy on disk, and give all parameter groups the weight decay of the first.)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llava.arguments import TrainingArguments
from llava.errors import CheckpointError
from llava.train.checkpointing import global_step, load_state, stored_weights
from llava.train.model_setup import SaveFormat, saved_parameters
from llava.train.zero import full_shape

logger = logging.getLogger(__name__)
WEIGHT: Final = "weight"
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
SETTINGS: Final = ("lr", "initial_lr", "betas", "eps", "weight_decay")
KERNELS: Final = ("foreach", "fused")  # settings of a group that say how a step is computed, not what it gives
CONVERTED: Final = ("adamw_torch", "adamw_torch_fused", "adam", "adamw")  # of --optim, and of a ZeRO file
SHARDS: Final = "*_optim_states.pt"
SCALER: Final = "scaler.pt"
Names = Sequence[Sequence[str]]
Weights = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Layout:
    """Where a run keeps its optimizer state: `stage` of ZeRO, 0 for DeepSpeed without it, None without DeepSpeed."""

    stage: int | None
    ranks: int
    bf16: bool = False  # DeepSpeed's BF16_Optimizer, which it uses for ZeRO-1 with float32 gradients

    def __str__(self) -> str:
        names = {None: "without DeepSpeed", 0: "under DeepSpeed without ZeRO"}
        return (
            f"{names.get(self.stage, f'under ZeRO-{self.stage}')} on {self.ranks} process{'es'[: 2 * (self.ranks > 1)]}"
        )

    def loads(self, other: Layout) -> bool:
        """Whether a run with this layout loads the files of a run with the `other` one as they are."""
        if self.stage is None or other.stage is None:
            return self.stage == other.stage
        family = [(min(layout.stage or 0, 1), layout.stage == 3, layout.bf16) for layout in (self, other)]
        return family[0] == family[1] and self.ranks == other.ranks


@dataclass(frozen=True)
class Group:
    """Names of the parameters of an optimizer's group, in order, and its settings."""

    names: list[str]
    settings: dict[str, Any]


@dataclass
class SavedState:
    """The optimizer state of a checkpoint, by parameter, whatever wrote it; `named` are the trained parameters."""

    layout: Layout
    weights: Weights  # float32
    named: Mapping[str, nn.Parameter] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    step: int = 0
    pieces: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)  # name and key: flat, in order
    loss_scale: float | None = None
    scheduler: dict[str, Any] | None = None  # of a ZeRO file's own schedule
    counters: dict[str, int] = field(default_factory=dict)

    def moment(self, name: str, key: str, shape: Sequence[int]) -> Tensor:
        """A moment of a parameter; zeros for one that never had a gradient."""
        pieces = self.pieces.get((name, key))
        return joined(pieces, shape) if pieces else torch.zeros(*shape)

    def check_groups(self, names: Names) -> None:
        """Raise `CheckpointError` unless the run has the parameter groups of the checkpoint."""
        if [group.names for group in self.groups] != [list(group) for group in names if group]:
            raise CheckpointError(
                f"The optimizer of the checkpoint has {len(self.groups)} parameter groups "
                f"({', '.join(str(len(group.names)) for group in self.groups)} parameters) and this run's has other "
                f"ones ({', '.join(str(len(group)) for group in names if group)}); train the same parameters, with "
                "the learning rates of that run, or use another --output_dir."
            )


def joined(pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The tensor of which `pieces` are flat, consecutive parts, with padding at the end or without."""
    flat = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
    return flat[: torch.Size(shape).numel()].view(*shape)


# --- Finding out and checking -----------------------------------------------------------------------------------------


def layout_of(checkpoint: Path) -> Layout:
    """The layout of the run that wrote a checkpoint."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return Layout(None, max(len(list(checkpoint.glob("rng_state*.pth"))), 1))
    shards = _shards(checkpoint)
    if not shards:
        return Layout(0, max(len(list(checkpoint.glob("rng_state*.pth"))), 1))
    state = _load(shards[0])["optimizer_state_dict"]
    return Layout(int(state.get("zero_stage", 1)), len(shards), bf16="zero_stage" not in state)


def layout_of_engine(engine: Any, ranks: int) -> Layout:
    return Layout(engine.zero_optimization_stage(), ranks, bf16=type(engine.optimizer).__name__ == "BF16_Optimizer")


def check_conversion(checkpoint: Path, args: TrainingArguments) -> None:
    """Raise `CheckpointError` if a run with these flags can neither load nor convert the optimizer state."""
    config: Mapping[str, Any] = args.hf_deepspeed_config.config if args.deepspeed else {}
    zero = config.get("zero_optimization", {})
    found = layout_of(checkpoint)
    now = Layout(zero.get("stage", 0) if args.deepspeed else None, args.world_size, found.bf16)
    if now.loads(found):
        return
    name = config.get("optimizer", {}).get("type") or getattr(args.optim, "value", args.optim)
    has_schedule = not (checkpoint / SCHEDULER_NAME).is_file()
    if name.lower() not in CONVERTED:
        reason = f"the state of the optimizer {name} is not converted, only that of adamw_torch"
    elif 0 in (found.stage, now.stage):
        reason = "only ZeRO stages 1 to 3 and runs without DeepSpeed are converted"
    elif has_schedule != ("scheduler" in config):
        which = "that run" if has_schedule else args.deepspeed
        reason = f'the learning rate of {which} follows the "scheduler" entry of a ZeRO file'
    elif "nvme" in ((zero.get(part) or {}).get("device") for part in ("offload_optimizer", "offload_param")):
        reason = f"{args.deepspeed} offloads to NVMe, where converted states cannot be put"
    else:
        return
    raise CheckpointError(
        f"{checkpoint} is from a run {found}, but this run is {now}: {reason}. Resume it as before, or use another "
        "--output_dir."
    )


def _folder(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()


def _shards(checkpoint: Path) -> list[Path]:
    """The optimizer shards of a DeepSpeed checkpoint, by rank."""
    ranks = ((re.search(r"zero_pp_rank_(\d+)_", file.name), file) for file in _folder(checkpoint).glob(SHARDS))
    return [file for _, file in sorted((int(rank[1]), file) for rank, file in ranks if rank)]


def _load(file: Path) -> Any:
    """Map a file of DeepSpeed into memory; of code, only its own records are allowed."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> Any:
        """In place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""
        if kind is not ZeroStageEnum:
            raise ValueError(f"{name} of {kind}")
        return ZeroStageEnum[name]

    records = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]
    with torch.serialization.safe_globals(records):
        return load_state(file, "DeepSpeed state")


# --- Reading ----------------------------------------------------------------------------------------------------------


def convert(checkpoint: Path, layout: Layout, model: nn.Module, saves: SaveFormat, names: Names) -> SavedState:
    """The state of a checkpoint for a run with this `layout` and these names in the groups of its optimizer."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    stored = {id(value): name for name, value in saved_parameters(model, saves)}
    own = {stored[id(value)]: name for name, value in trained.items() if id(value) in stored}

    def weights() -> Iterator[tuple[str, Tensor]]:
        return ((own[name], value) for name, value in stored_weights(checkpoint, saves) if name in own)

    names = names or [list(trained)]  # the optimizer of a ZeRO file has one group
    saved = read(checkpoint, names, weights)
    saved.check_groups(names)
    saved.named = trained
    saved.counters.setdefault("global_steps", global_step(checkpoint))
    logger.info(
        "Converting the optimizer state of a run %s to that of this run, %s. Random numbers, as for dropout, differ "
        "from those of an uninterrupted run.",
        saved.layout,
        layout,
    )
    return saved


def read(checkpoint: Path, names: Names, weights: Weights) -> SavedState:
    """The state of a checkpoint, mapped into memory.

    A run without DeepSpeed stores parameters by their place in the groups: `names` are those of this run. Its model
    files hold the float32 `weights`, ZeRO shards have their own.
    """
    layout = layout_of(checkpoint)
    return _read_plain(checkpoint, layout, names, weights) if layout.stage is None else _read_zero(checkpoint, layout)


def _read_plain(checkpoint: Path, layout: Layout, names: Names, weights: Weights) -> SavedState:
    saved = SavedState(layout, weights)
    state = load_state(checkpoint / OPTIMIZER_NAME, "optimizer state")
    groups = [group for group in state["param_groups"] if group["params"]]
    names = [list(group) for group in names if group]
    for place, group in enumerate(groups):
        own = names[place] if place < len(names) and len(names[place]) == len(group["params"]) else group["params"]
        saved.groups.append(Group([str(name) for name in own], _settings(group)))
        for index, name in zip(group["params"], own):
            entry = state["state"].get(index, {})
            _check_moments(entry, checkpoint)
            saved.step = max(saved.step, int(entry.get("step", 0)))
            saved.pieces.update({(name, key): [entry[key].flatten()] for key in MOMENTS if entry})
    if (checkpoint / SCALER).is_file():
        saved.loss_scale = float(load_state(checkpoint / SCALER, "gradient scaler")["scale"])
    return saved


def _read_zero(checkpoint: Path, layout: Layout) -> SavedState:
    shards = [_load(file)["optimizer_state_dict"] for file in _shards(checkpoint)]
    count = shards[0]["partition_count"]
    if len(shards) != (max(count) if isinstance(count, list) else count):
        raise CheckpointError(f"{checkpoint} has {len(shards)} optimizer shards and needs {count}; copy all of them.")
    model = _load(next(iter(sorted(_folder(checkpoint).glob("*_model_states.pt")))))
    partitioned = layout.stage == 3
    bases = [shard["optimizer_state_dict" if partitioned else "base_optimizer_state"] for shard in shards]
    flats = [shard["fp32_flat_groups" if partitioned else "single_partition_of_fp32_groups"] for shard in shards]
    shapes: list[Mapping[str, torch.Size]] = model["param_shapes"]
    pieces: dict[tuple[str, str], list[Tensor]] = {}
    sizes = {name: size for part in shapes for name, size in part.items()}
    saved = SavedState(layout, lambda: ((name, joined(pieces[name, WEIGHT], size)) for name, size in sizes.items()))
    saved.pieces = pieces
    for part, named in enumerate(shapes):
        states = [base["state"].get(part, {}) for base in bases]
        _check_moments(states[0], checkpoint)
        columns = {WEIGHT: [flat[part].detach() for flat in flats]}
        columns |= {key: [state[key] for state in states] for key in MOMENTS if states[0]}
        gaps = None if partitioned else shards[0].get("param_alignment_paddings")
        for key, column in columns.items():
            cut = _cut_partitioned(column, named) if partitioned else _cut(column, named, gaps and gaps[part])
            pieces.update({(name, key): found for name, found in cut})
        saved.step = max(saved.step, int(states[0].get("step", 0)))
    for group in bases[0]["param_groups"]:
        saved.groups.append(Group([name for part in group["params"] for name in shapes[part]], _settings(group)))
        saved.step = max(saved.step, int(group.get("step") or 0))
    saved.groups = [group for group in saved.groups if group.names]
    saved.loss_scale = float(shards[0]["loss_scaler"].cur_scale) if shards[0].get("dynamic_loss_scale") else None
    saved.scheduler = model["lr_scheduler"]
    saved.counters = {key: int(model[key]) for key in ("global_steps", "global_samples", "skipped_steps")}
    return saved


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in SETTINGS if key in group}


def _check_moments(state: Mapping[str, Any], checkpoint: Path) -> None:
    tensors = {key for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    if state and tensors != set(MOMENTS):
        raise CheckpointError(
            f"{checkpoint} holds the state of another optimizer than AdamW ({', '.join(sorted(map(str, state)))}), "
            "which is not converted; resume it on the same number of processes with the same --deepspeed file."
        )


def _cut(
    column: Sequence[Tensor], named: Mapping[str, torch.Size], gaps: Sequence[int] | None
) -> Iterator[tuple[str, list[Tensor]]]:
    """Pieces of each parameter under ZeRO-1 and 2, whose ranks hold equal parts of one flat tensor of all of them."""
    start = 0
    for place, (name, shape) in enumerate(named.items()):
        end, begin, pieces = start + shape.numel(), 0, []
        for part in column:
            low, high = max(start - begin, 0), min(end - begin, part.numel())
            if low < high:
                pieces.append(part[low:high])
            begin += part.numel()
        yield name, pieces
        start = end + (gaps[place] if gaps else 0)


def _cut_partitioned(column: Sequence[Tensor], named: Mapping[str, torch.Size]) -> Iterator[tuple[str, list[Tensor]]]:
    """Pieces of each parameter under ZeRO-3, whose ranks hold equal parts of each of them, the last one padded."""
    start = 0
    for name, shape in named.items():
        end = start + -(-shape.numel() // len(column))
        yield name, [part[start:end] for part in column]
        start = end


# --- Writing ----------------------------------------------------------------------------------------------------------


def to_optimizer(saved: SavedState, optimizer: torch.optim.Optimizer) -> None:
    """Continue with a saved state in a run without DeepSpeed: weights, moments and settings of the groups."""
    named = saved.named
    groups = [group for group in optimizer.param_groups if group["params"]]
    for name, value in _checked(saved.weights(), named):
        named[name].data.copy_(value)
    for group, source in zip(groups, saved.groups):
        group.update(source.settings)
        for name in source.names:
            parameter = named[name]
            state = optimizer.state[parameter] = {"step": _step(saved, parameter, group)}
            for key in MOMENTS:
                value = saved.moment(name, key, parameter.shape)
                state[key] = value.to(parameter.device, torch.float32, copy=True)


def keep_kernels(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Replace the `KERNELS` of a state dict by those of `optimizer`: `--optim` is a flag of this run, not state."""
    for saved, group in zip(state["param_groups"], optimizer.param_groups):
        saved.update({key: group[key] for key in KERNELS if key in group})


def to_engine(saved: SavedState, engine: Any) -> None:
    """Continue with a saved state in a DeepSpeed engine with ZeRO: this rank's parts of weights and moments."""
    named, zero = saved.named, engine.optimizer
    partitioned = hasattr(zero, "fp32_partitioned_groups_flat")
    if partitioned:
        zero.checkpoint_event_prologue()
    for group, source in zip(zero.param_groups, saved.groups):
        group.update(source.settings)
        if "step" in group or type(zero.optimizer).__name__ == "FusedAdam":
            group["step"] = saved.step
    flats = zero.fp32_partitioned_groups_flat if partitioned else [p for g in zero.param_groups for p in g["params"]]
    of_torch = isinstance(zero.optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for flat in flats:
        zero.state[flat] = {"step": _step(saved, flat, zero.optimizer.defaults) if of_torch else saved.step}
        zero.state[flat].update({key: torch.zeros_like(flat.data) for key in MOMENTS})
    if not partitioned:
        zero._lazy_init_hp_params_optimizer_state()  # else the first step does it, after the states are set
    write = _write_partition if partitioned else _write_whole
    for name, value in _checked(saved.weights(), named):
        write(named[name], value, None)
    for name in (name for group in saved.groups for name in group.names):
        for key in MOMENTS:
            write(named[name], saved.moment(name, key, full_shape(named[name])), key)
    if partitioned:
        zero.checkpoint_event_epilogue()
    if saved.loss_scale is not None and getattr(zero, "dynamic_loss_scale", False):
        zero.loss_scale = saved.loss_scale
    if engine.lr_scheduler is not None and saved.scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved.scheduler)
    for counter, count in saved.counters.items():
        setattr(engine, counter, count)


def _step(saved: SavedState, parameter: Tensor, settings: Mapping[str, Any]) -> Tensor:
    on_device = settings.get("fused") or settings.get("capturable")
    return torch.tensor(float(saved.step), device=parameter.device if on_device else "cpu")


def _checked(weights: Iterable[tuple[str, Tensor]], named: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The saved weights, all of the trained parameters and of the same shapes."""
    missing = set(named)
    for name, value in weights:
        shape = full_shape(named[name]) if name in named else None
        if shape != tuple(value.shape):
            raise CheckpointError(
                f"{name} is {tuple(value.shape)} in the checkpoint, but {shape or 'not trained'} in this run; use its "
                "flags."
            )
        missing.discard(name)
        yield name, value
    if missing:
        raise CheckpointError(f"The checkpoint has no trained weights of {min(missing)}; use the flags of its run.")


def _write_whole(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Under ZeRO-1 and 2: every rank has the working copy of the weight and parts of the rest."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if key is not None:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    safe_set_full_fp32_param(parameter, value)
    parameter.data.copy_(value)


def _write_partition(parameter: Any, value: Tensor, key: str | None) -> None:
    """Under ZeRO-3: every rank has one part of everything. (The functions for full values refuse padded ones.)"""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    part = value.flatten()[start : start + size]
    part = functional.pad(part, (0, size - part.numel()))
    if key is not None:
        safe_set_local_optimizer_state(parameter, part, key)
        return
    safe_set_local_fp32_param(parameter, part)
    parameter.ds_tensor.data.copy_(part)
