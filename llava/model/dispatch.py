"""One model on several devices: which part goes where, and the hooks that carry activations between them (MGPU).

Embeddings, tower and projector stay together on the first device, so that features meet the words where they are
spliced; decoder layers follow in order; the last norm and the head stay together on the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from llava.errors import ConfigError
from llava.model.quantization import PREFIXES, weight_bytes
from llava.placement import Placement, balanced_device_map, gpu_budgets, resolve_device

DeviceMap = str | Mapping[str, str | int | torch.device] | None
_LAYER = re.compile(r"(?:" + "|".join(map(re.escape, PREFIXES)) + r")\d+")
_END = re.compile(r"model\.norm\.|transformer\.norm_f\.|lm_head\.")


def parts_of(shapes: Mapping[str, tuple[int, ...]], dtype: str, tied: bool) -> list[tuple[tuple[str, ...], int]]:
    """Module names and bytes of what is placed as one, in the order of computation; a tied head stays in front."""
    front, end = 0, 0
    layers: dict[str, int] = {}
    ends: set[str] = set()
    for name, shape in shapes.items():
        size = weight_bytes(name, shape, dtype)
        layer = _LAYER.match(name)
        if layer:
            layers[layer[0]] = layers.get(layer[0], 0) + size
        elif _END.match(name) and not (tied and name.startswith("lm_head.")):
            end, ends = end + size, ends | {name.rpartition(".")[0]}
        elif not (tied and name.startswith("lm_head.")):
            front += size
    ordered = sorted(layers, key=lambda name: int(name.rpartition(".")[2]))
    return [(("",), front), *(((name,), layers[name]) for name in ordered), (tuple(sorted(ends)), end)]


def infer_device_map(
    device: torch.device,
    device_map: DeviceMap,
    *,
    shapes: Any,
    dtype: str,
    tied: bool,
    num_gpus: int | None = None,
    max_memory: str | None = None,
) -> Placement:
    """Where each weight goes. `shapes()` gives names and shapes of all, asked for only when it matters.

    A mapping is taken as it is, names to devices. Otherwise everything goes to `device`, except where that is CUDA
    without a number and the weights do not fit on the first GPU, or limits are given: then on as few as hold them.
    """
    if isinstance(device_map, Mapping):
        if num_gpus is not None or max_memory is not None:
            raise ConfigError("A device map says all; leave --num-gpus and --max-memory out, or the map.")
        return Placement({name: _explicit(where) for name, where in device_map.items()})
    limited = num_gpus is not None or max_memory is not None
    if device != torch.device("cuda"):
        if limited:
            raise ConfigError(
                f"--num-gpus and --max-memory share out GPUs, but the device is {device}; use --device cuda."
            )
        return Placement({"": device})
    if not limited and torch.cuda.device_count() == 1:
        return Placement({"": device})
    parts = parts_of(shapes(), dtype, tied)
    if not limited:
        [(first, room)] = gpu_budgets(1, None).items()
        if sum(size for _, size in parts) <= room:
            return Placement({"": first})  # without asking the others, which costs memory on each
    return balanced_device_map(parts, gpu_budgets(num_gpus, max_memory))


def _explicit(where: str | int | torch.device) -> torch.device:
    return resolve_device(f"cuda:{where}" if isinstance(where, int) else where)


def dispatch(model: Any, placement: Placement) -> None:
    """Let a model whose weights lie as `placement` says run: inputs go to each part, logits come back to the ids."""
    if not placement.is_split:
        return
    core = model.get_model()
    layers = [name for name, module in core.named_children() if isinstance(module, nn.ModuleList)]
    names = [f"{model.base_model_prefix}.{name}" for name, _ in core.named_children() if name not in layers]
    names += [f"{model.base_model_prefix}.{part}.{i}" for part in layers for i in range(len(getattr(core, part)))]
    for name in [*names, "lm_head"]:
        module = model.get_submodule(name)
        if any(True for _ in module.parameters()) and "vision_tower" not in name:
            weight = next(module.parameters()).device
            add_hook_to_module(module, AlignDevicesHook(execution_device=weight))
    first = core.get_input_embeddings().weight.device
    add_hook_to_module(
        model, AlignDevicesHook(execution_device=first, io_same_device=True, skip_keys="past_key_values")
    )
    model.hf_device_map = {name: str(where) for name, where in placement.devices.items()}
