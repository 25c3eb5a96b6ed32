"""DeepSpeed: what a ZeRO file really does, integers where the library writes floats, and gathering of partitions.

The shipped `scripts/zero*.json` follow spec/train.md §11; any file of a user's passes through here as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llava.errors import ConfigError
from llava.model.zero import gathered
from llava.utils import require

logger = logging.getLogger(__name__)


def read_config(path: str) -> dict[str, Any]:
    """The ZeRO file as a dictionary; DeepSpeed itself must be importable."""
    require("deepspeed", "train")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--deepspeed names {path}, which does not exist; scripts/zero*.json are shipped.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"--deepspeed names {path}, which is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed names {path}, which holds no JSON object.")
    return config


def settle(config: dict[str, Any], hidden_size: int) -> None:
    """Say in `config`, in place, what libraries would fill in differently from version to version.

    transformers 4.36.2 fills one "auto" with a float, which DeepSpeed refuses; a file without `gradient_clipping` means
    no clipping, as in the published recipes, while DeepSpeed clips at 1.0 from 0.19 on.
    """
    config.setdefault("gradient_clipping", 0.0)
    zero = config.get("zero_optimization", {})
    if zero.get("stage3_prefetch_bucket_size") == "auto":
        zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden_size * hidden_size)


def describe(config: dict[str, Any] | None, max_grad_norm: float, scheduler: str) -> str:
    """One line on what the run does with gradients and learning rate; a ZeRO file can overrule the flags (T23)."""
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
    return f"ZeRO stage {stage}: gradients are {clipped}; the learning rate follows {schedule}."


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def collect(named: Iterable[tuple[str, torch.nn.Parameter]], *, keep: bool = True) -> dict[str, torch.Tensor]:
    """CPU copies of whole parameters, one gathered at a time; ranks with `keep=False` take part and get nothing."""
    state = {}
    for name, parameter in named:
        with gathered([parameter], modifier_rank=None):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state
