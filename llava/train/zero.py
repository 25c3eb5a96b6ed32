"""DeepSpeed ZeRO: reading a configuration file, filling in values, and gathering partitioned parameters.

Applies to the shipped `scripts/zero*.json` and to any other file passed to `--deepspeed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava.arguments import TrainingArguments
from llava.errors import ConfigError
from llava.model.zero import gathered
from llava.utils import require

ZeroConfig = dict[str, Any]


def read_config(path: str) -> ZeroConfig:
    """Read a ZeRO file; raises `ConfigError` if it is not a JSON object, `DependencyError` without DeepSpeed."""
    require("deepspeed", "train")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--deepspeed {path} does not exist; scripts/zero*.json are shipped.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"--deepspeed {path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path} must hold a JSON object, got {type(config).__name__}.")
    return config


def check_batch_sizes(args: TrainingArguments) -> None:
    """Raise `ConfigError` if the ZeRO file sets a batch size or accumulation itself, other than the run's."""
    config = read_config(args.deepspeed)
    batch = args.per_device_train_batch_size
    run = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": batch * args.world_size,
    }
    for key, value in run.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f'"{key}" must be "auto" in {args.deepspeed}, got {config[key]!r}; --global_batch_size sets the '
                "samples of a step, --per_device_train_batch_size those of a micro-batch."
            )


def fill_defaults(config: ZeroConfig, hidden_size: int) -> None:
    """Set, in place, the values that library versions fill in differently.

    transformers 4.36.2 replaces one "auto" by a float, which DeepSpeed rejects. The published recipes have no
    `gradient_clipping` entry and do not clip, but DeepSpeed clips at 1.0 without one from 0.19 on. Gradients are
    accumulated in float32; by default DeepSpeed adds them up in the dtype of the weights.
    """
    config.setdefault("gradient_clipping", 0.0)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if stage == 1:  # exchanges the sums, once a step; stages 2 and 3 exchange each micro-batch's gradients as computed
        config.setdefault("communication_data_type", "fp32")
    if zero.get("stage3_prefetch_bucket_size") == "auto":
        zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size * hidden_size)


def describe_schedule(config: ZeroConfig | None, max_grad_norm: float, scheduler: str) -> str:
    """One line about gradients and the learning rate schedule, in which a ZeRO file can override the flags."""
    if config is None:
        clipped = f"clipped at norm {max_grad_norm}" if max_grad_norm else "not clipped"
        return f"Gradients are {clipped}; the learning rate follows {scheduler}."
    clipping = config.get("gradient_clipping", 0.0)
    if clipping == "auto":
        clipping = max_grad_norm
    clipped = (
        f"clipped at norm {clipping} by DeepSpeed"
        if clipping
        else 'not clipped, because the ZeRO file has no "gradient_clipping" entry (as in the published recipes; add '
        '"gradient_clipping": "auto" to use --max_grad_norm)'
    )
    own = config.get("scheduler", {}).get("type")
    schedule = f"{own} of the ZeRO file, not --lr_scheduler_type {scheduler}" if own else scheduler
    stage = config.get("zero_optimization", {}).get("stage", 0)
    dtype = "float32" if stage else "the dtype of the weights (scripts/zero1.json accumulates in float32)"
    return (
        f"ZeRO stage {stage}: gradients are accumulated in {dtype} and {clipped}; the learning rate follows {schedule}."
    )


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the unpartitioned parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather_state_dict(named: Iterable[tuple[str, nn.Parameter]], *, is_writer: bool = True) -> dict[str, Tensor]:
    """CPU copies of full parameters, gathered one at a time; collective, and empty on ranks without `is_writer`."""
    state = {}
    for name, parameter in named:
        with gathered([parameter], modifier_rank=None):
            if is_writer:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def full_state_dict(model: nn.Module, *, is_writer: bool) -> dict[str, Tensor]:
    """All full parameters and persistent buffers on the CPU; collective, and empty on ranks without `is_writer`."""
    state = gather_state_dict(model.named_parameters(), is_writer=is_writer)
    if is_writer:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state |= {name: value.detach().cpu() for name, value in model.state_dict().items() if name not in parameters}
    return state
