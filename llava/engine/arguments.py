"""Flags of every program that loads a model to use it, and the arguments of `load_pretrained_model` they stand for."""

from __future__ import annotations

import argparse
from typing import Any, Final

from llava.placement import ATTENTION

NAMES: Final = ("vision_tower", "num_gpus", "max_memory", "attn_implementation", "text_only")


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Beside the path, device and dtype: what else of a model can be chosen when it is loaded."""
    add = parser.add_argument
    add("--vision-tower", help="the tower to use instead of the one the checkpoint names")
    add("--num-gpus", type=int, help="share the weights out over the first so many GPUs (default: as few as hold them)")
    add(
        "--max-memory", help="memory for weights: 20GiB on each GPU, or 0=10GiB,1=20GiB (default: most of what is free)"
    )
    add("--attn-implementation", "--attn_implementation", choices=ATTENTION, default="auto")
    add("--text-only", action="store_true", help="load a language model without a tower, or an adapter of one")


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `load_pretrained_model`, from flags that may be absent."""
    return {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
