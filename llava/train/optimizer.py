"""Parameter groups of the optimizer: with and without weight decay, and parts of the model at rates of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import transformers
from torch import nn

from llava.arguments import TrainingArguments
from llava.errors import ConfigError

# Flag of a part's own learning rate -> what the names of its parameters contain.
OWN_RATES: Final = {"mm_projector_lr": "mm_projector"}
Group = dict[str, Any]


def own_rates(args: TrainingArguments) -> dict[str, float]:
    """The flags of `OWN_RATES` that are set, with their values."""
    return {flag: rate for flag in OWN_RATES if (rate := getattr(args, flag, None)) is not None}


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], decayed: Collection[str], weight_decay: float, rates: Mapping[str, float]
) -> list[Group]:
    """Groups of the trained parameters; those of the parts in `rates` (see `OWN_RATES`) come last, with their `lr`.

    Parameters named in `decayed` get `weight_decay`. Empty groups are left out; each group has the `flag` of its part.
    """
    decayed = set(decayed)
    groups: dict[tuple[str, bool], Group] = {
        (flag, decays): {"params": [], "weight_decay": weight_decay if decays else 0.0, "flag": flag}
        | ({"lr": rates[flag]} if flag else {})
        for flag in ("", *rates)
        for decays in (True, False)
    }
    for name, parameter in named:
        if parameter.requires_grad:
            flag = next((flag for flag in rates if OWN_RATES[flag] in name), "")
            groups[flag, name in decayed]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def group_names(groups: Iterable[Group], model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each group, in the order in which an optimizer stores their states."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def describe_rates(groups: Iterable[Mapping[str, Any]], learning_rate: float) -> str:
    """One line about the learning rates of the groups."""
    parts = {group["flag"]: group["lr"] for group in groups if group["flag"]}
    return "Peak learning rates: " + ", ".join(
        [f"{learning_rate:g}", *(f"{rate:g} for {OWN_RATES[flag]} (--{flag})" for flag, rate in parts.items())]
    )


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
