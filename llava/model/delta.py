"""Delta weights: target - base, computed in float32 and cast once.

Word embeddings and the head may have more rows in the target (image tokens): the base is subtracted from the leading
rows. Projector and vision tower, which a base does not have, are stored unchanged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Final

from torch import Tensor

from llava.errors import CheckpointError
from llava.model import checkpoint as ckpt
from llava.model.saving import WeightSource

ADDED_PREFIXES: Final = (*ckpt.PROJECTOR_PREFIXES, *ckpt.TOWER_PREFIXES)
RESIZABLE: Final = (*ckpt.EMBEDDINGS, "lm_head.weight")
DROPPED: Final = "rotary_emb.inv_freq"  # stored by older releases of transformers


def check_pair(base: WeightSource, other: WeightSource) -> None:
    """Raise `CheckpointError` unless names and shapes are those of a base and a model or delta derived from it."""
    for name, shape in other.shapes.items():
        below = base.shapes.get(name)
        if below is None and not name.startswith(ADDED_PREFIXES) and DROPPED not in name:
            raise CheckpointError(
                f"{other.path} has {name}, which is missing from {base.path} and is not part of a projector or vision "
                "tower. Pass the base this model was made from."
            )
        fits = below in (None, shape) or (
            name in RESIZABLE and len(below or ()) == len(shape) and all(b <= s for b, s in zip(below or (), shape))
        )
        if not fits:
            raise CheckpointError(
                f"{name} is {below} in {base.path}, but {shape} in {other.path}. Pass the base of this model."
            )
    lost = [name for name in base.shapes if name not in other.shapes and DROPPED not in name]
    if lost:
        raise CheckpointError(
            f"{lost[0]} of {base.path} is missing from {other.path}. Pass the base this model was made from."
        )


def check_differences(base: WeightSource, delta: WeightSource) -> None:
    """Raise `CheckpointError` if `delta` holds a model: its final norm is near the base's, a difference is near 0."""
    for name in delta.shapes.keys() & base.shapes.keys() & set(ckpt.FINAL_NORMS):
        found = delta.read(name).float()
        if bool((found - base.read(name).float()).abs().sum() < found.abs().sum()):
            raise CheckpointError(
                f"{delta.path} holds a model, not differences from {base.path}: its final norm is near that of the "
                "base. Pass the directory of the delta."
            )


def add_scaled(tensor: Tensor, base: Tensor, sign: int) -> Tensor:
    """`tensor + sign * base` in float32; a smaller base is added to the leading block."""
    result = tensor.float()
    result = result.clone() if result is tensor else result
    result[tuple(slice(0, size) for size in base.shape)] += sign * base.float()
    return result


def combine(
    base: WeightSource, other: WeightSource, rule: Callable[[str, Tensor, Tensor | None], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield `rule(name, tensor, base tensor or None)` for every weight of `other`, one shard at a time."""
    for name, tensor in ckpt.iter_tensors(other.path, lambda name: DROPPED not in name):
        yield name, rule(name, tensor, base.read(name) if name in base.shapes else None)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments common to `make_delta` and `apply_delta`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-model-path", required=True, help="directory of the language model, e.g. LLaMA")
    parser.add_argument("--target-model-path", required=True, help="directory of the chat model")
    parser.add_argument("--delta-path", required=True, help="directory of the delta")
    return parser
