"""Place one model on several GPUs: the device map, and hooks that move activations between devices.

Embeddings, tower and projector share the first device, where image features are spliced in; decoder layers follow in
order; the final norm and the head share the last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from llava.errors import ConfigError
from llava.model.quantization import PREFIXES, weight_bytes
from llava.placement import Placement, balanced_device_map, gpu_budgets, resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

DeviceMap = str | Mapping[str, str | int | torch.device] | None
_LAYER = re.compile(r"(?:" + "|".join(map(re.escape, PREFIXES)) + r")\d+")
_END = re.compile(r"model\.norm\.|transformer\.norm_f\.|lm_head\.")


def split_parts(shapes: Mapping[str, tuple[int, ...]], storage: str, tied: bool) -> list[tuple[tuple[str, ...], int]]:
    """Names and bytes of the modules that share a device, in order of computation; a tied head belongs to the first."""
    front, end = 0, 0
    layers: dict[str, int] = {}
    ends: set[str] = set()
    for name, shape in shapes.items():
        size = weight_bytes(name, shape, storage)
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
    shapes: Callable[[], Mapping[str, tuple[int, ...]]],
    storage: str,
    tied: bool,
    num_gpus: int | None = None,
    max_memory: str | None = None,
) -> Placement:
    """The device of each weight; `shapes()`, names and shapes of all weights, is called only if needed.

    A mapping is used as given. Otherwise all weights go to `device`, unless that is "cuda" without an index and they do
    not fit on the first GPU, or a limit is given: then to as few GPUs as hold them.
    """
    if isinstance(device_map, Mapping):
        if num_gpus is not None or max_memory is not None:
            raise ConfigError("A device map excludes --num-gpus and --max-memory; remove the map, or the limits.")
        return Placement({name: _explicit(where) for name, where in device_map.items()})
    limited = num_gpus is not None or max_memory is not None
    if device != torch.device("cuda"):
        if limited:
            raise ConfigError(f"--num-gpus and --max-memory require --device cuda, got {device}.")
        return Placement({"": device})
    if not limited and torch.cuda.device_count() == 1:
        return Placement({"": device})
    parts = split_parts(shapes(), storage, tied)
    if not limited:
        [(first, room)] = gpu_budgets(1, None).items()
        if sum(size for _, size in parts) <= room:
            return Placement({"": first})  # querying the others would cost memory on each
    return balanced_device_map(parts, gpu_budgets(num_gpus, max_memory))


def _explicit(where: str | int | torch.device) -> torch.device:
    return resolve_device(f"cuda:{where}" if isinstance(where, int) else where)


def dispatch(model: LlavaLlamaForCausalLM, placement: Placement) -> None:
    """Add hooks that move inputs to the device of each part, and logits back to that of the ids.

    The weights must be placed according to `placement`. Does nothing on a single device.
    """
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
    first = cast("PreTrainedModel", model).get_input_embeddings().weight.device
    add_hook_to_module(
        model, AlignDevicesHook(execution_device=first, io_same_device=True, skip_keys="past_key_values")
    )
    model.hf_device_map = {name: str(where) for name, where in placement.devices.items()}
