"""Parameter groups of the optimizer: with and without weight decay, parts of the model at their own rates, by layer.

With layer-wise decay D (ELECTRA, arXiv:2003.10555; BEiT, arXiv:2106.08254) a parameter at depth k of a part with n
layers has the rate `lr * D ** (n - k)`: embeddings are at depth 0, the first layer at 1, the last layer and what
follows it (norm, head) at n. `lr` is the rate of the part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import transformers
from torch import nn

from llava.arguments import TrainingArguments
from llava.errors import ConfigError
from llava.utils import require

Group = dict[str, Any]


class Part(NamedTuple):
    """A part of the model: what the names of its parameters contain, and the flags of its rate and its layer decay."""

    name: str
    rate: str
    decay: str


# A parameter belongs to the first part whose name it contains; the last is the language model.
PARTS: Final = (
    Part("mm_projector", "mm_projector_lr", ""),
    Part("vision_tower", "mm_vision_tower_lr", "mm_vision_layer_decay"),
    Part("", "", "llm_layer_decay"),
)
RATE_FLAGS: Final = tuple(flag for part in PARTS for flag in (part.rate, part.decay) if flag)


def own_rates(args: TrainingArguments) -> dict[str, float]:
    """The flags of `RATE_FLAGS` that are set, with their values."""
    return {flag: value for flag in RATE_FLAGS if (value := getattr(args, flag, None)) is not None}


def layers_above(names: Sequence[str]) -> dict[str, int]:
    """`n - k` of the parameters of a part, given in the order of the model; the first number in a name is the layer."""
    numbers = [re.search(r"\.(\d+)\.", name) for name in names]
    layers = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    depth, above = 0, {}
    for name, number in zip(names, numbers):
        depth = int(number[1]) + 1 if number else layers if depth else 0
        above[name] = layers - depth
    return above


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    decayed: Collection[str],
    weight_decay: float,
    learning_rate: float,
    rates: Mapping[str, float],
) -> list[Group]:
    """Groups of the trained parameters, each with its `lr`, by part, layer (from the last) and weight decay.

    `rates` are the set flags of `RATE_FLAGS`. Parameters at `learning_rate` come first; groups of a part with a rate of
    its own have its `flag`. Parameters named in `decayed` get `weight_decay`. Raises `ConfigError` for a flag of a part
    that is not trained.
    """
    parameters, decayed = dict(named), set(decayed)
    parts = {name: next(part for part in PARTS if part.name in name) for name in parameters}
    above: dict[str, int] = {}
    for part in PARTS:
        if part.decay in rates:
            above |= layers_above([name for name in parameters if parts[name] is part])
    groups: dict[tuple[str, int, bool], Group] = {}
    unused = set(rates)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            part, layers, decays = parts[name], above.get(name, 0), name in decayed
            unused -= {part.rate, part.decay}
            flag = part.rate if part.rate in rates else ""
            rate = rates.get(part.rate, learning_rate) * rates.get(part.decay, 1.0) ** layers
            empty = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr": rate, "flag": flag}
            key = (part.name if flag or layers else "", layers, not decays)
            groups.setdefault(key, empty)["params"].append(parameter)
    if unused:
        raise ConfigError(f"--{min(unused)} has no effect, because nothing of that part is trained; drop it.")
    return [groups[key] for key in sorted(groups)]


def logged_groups(groups: Sequence[Group]) -> dict[str, int]:
    """The flag of each rate in `groups`, and the index of the group that has it undiminished."""
    return {group["flag"]: index for index, group in reversed([*enumerate(groups)]) if group["flag"]}


def describe_rates(learning_rate: float, rates: Mapping[str, float]) -> str:
    """One line about the learning rates."""
    texts = []
    for part in sorted(PARTS):
        text = f"{rates.get(part.rate, learning_rate):g}{f' for {part.name}' if part.name else ''}"
        text += f" (--{part.rate})" if part.rate in rates else ""
        if part.decay in rates:
            text += f", times {rates[part.decay]:g} for each layer below the last (--{part.decay})"
        texts += [text] if not part.name or rates.keys() & {part.rate, part.decay} else []
    return f"Peak learning rates: {', '.join(texts)}"


def keep_embeddings_in_32_bit(model: nn.Module, optimizer: object) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep 32-bit states of embeddings, as its documentation recommends.

    Some rows of an embedding get no gradient, others large ones (arXiv:2110.02861, section 2.3).
    """
    if type(optimizer).__module__.startswith("bitsandbytes."):
        manager = require("bitsandbytes", "quant").optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.override_config(module.weight, "optim_bits", 32)


def group_names(groups: Iterable[Group], model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each group, in the order in which an optimizer stores their states."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def check_optimizer(args: TrainingArguments) -> None:
    """Raise `ConfigError` for an optimizer that cannot be created: a missing package, or rates that it would ignore."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, ImportError, RuntimeError) as error:
        name, reason = getattr(args.optim, "value", args.optim), str(error).rstrip(".!")
        raise ConfigError(f"--optim {name} cannot be used: {reason}; install it, or use adamw_torch.") from error
    rates = own_rates(args)
    if rates and args.deepspeed and "optimizer" in args.hf_deepspeed_config.config:
        raise ConfigError(
            f'--{next(iter(rates))} has no effect on the optimizer of {args.deepspeed}; remove its "optimizer" '
            "entry, or use scripts/zero3.json."
        )
