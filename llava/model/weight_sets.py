"""Choose between several sets of weights in one directory, such as a single file and the shards of an older save."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from llava.errors import CheckpointError

logger = logging.getLogger(__name__)
TensorReader = Callable[[Path], Iterable[tuple[str, Tensor]]]
Sample = tuple[tuple[int, ...], Tensor]  # the shape of a weight, and all or some of its values
OPTIONAL: Final = ("rotary_emb.inv_freq", "position_ids", "lm_head.weight")  # buffers, and the head if it is tied


@dataclass(frozen=True)
class WeightSet:
    """Weights stored under one name: a file, or the shards of an index."""

    name: str
    files: tuple[Path, ...]
    missing: tuple[str, ...]  # files that are absent, empty or Git LFS pointers


def choose(path: Path, sets: list[WeightSet], read: TensorReader, *, whole: bool) -> WeightSet | None:
    """The first complete one of the `sets` in `path`, or None.

    Raises `CheckpointError` if another set holds different weights. Compares shapes and values: all of them if `whole`,
    else those of the first and the last row. Missing and unreadable files of the others are logged and ignored.
    """
    chosen = next((one for one in sets if one.files and not one.missing), None)
    for other in sets:
        if chosen is None or other is chosen:
            continue
        stamps = tuple(_stamp(file) for one in (chosen, other) for file in one.files)
        name = _difference(chosen, other, read, whole, stamps)
        if name is not None:
            raise CheckpointError(
                f"{path} holds two sets of weights that differ in {name}: {chosen.name} and {other.name}; keep the "
                "right one, and move the other away."
            )
    return chosen


def _stamp(file: Path) -> tuple[int, int]:
    state = file.stat() if file.is_file() else None
    return (state.st_mtime_ns, state.st_size) if state else (0, 0)


@lru_cache(maxsize=64)
def _difference(
    chosen: WeightSet, other: WeightSet, read: TensorReader, whole: bool, stamps: tuple[tuple[int, int], ...]
) -> str | None:
    """The name of a weight that differs between two sets, or None. `stamps` is the state of their files."""
    try:
        theirs = _samples([file for file in other.files if file.name not in other.missing], read, whole)
        ours = _samples(chosen.files, read, whole)
    except CheckpointError as error:
        logger.warning("%s %s is read, without comparing it with %s.", error, chosen.files[0], other.name)
        return None
    if other.missing or not other.files:
        logger.warning("%s is read; the files of %s are not complete.", chosen.files[0], other.name)
    for name in sorted(theirs if other.missing else theirs | ours):
        if name in ours and name in theirs:
            if not _equal(ours[name], theirs[name]):
                return name
        elif not name.endswith(OPTIONAL):
            return name
    return None


def _samples(files: Iterable[Path], read: TensorReader, whole: bool) -> dict[str, Sample]:
    """The shape of each weight, and its values: all of them if `whole`, else its first and last row."""
    samples = {}
    for file in files:
        for name, tensor in read(file):
            rows = tensor if whole or not tensor.dim() else torch.cat([tensor[:1], tensor[-1:]])
            samples[name] = tuple(tensor.shape), rows
    return samples


def _equal(one: Sample, other: Sample) -> bool:
    """Whether shapes and values are equal; values of different dtypes, up to rounding."""
    (shape, ours), (other_shape, theirs) = one, other
    if shape != other_shape:
        return False
    if ours.dtype == theirs.dtype:
        return torch.equal(*(values.contiguous().reshape(-1).view(torch.uint8) for values in (ours, theirs)))
    if not (ours.is_floating_point() and theirs.is_floating_point()):
        return torch.equal(ours.double(), theirs.double())
    rounding = 2 * max(torch.finfo(values.dtype).eps for values in (ours, theirs))
    return torch.allclose(ours.float(), theirs.float(), rtol=rounding, atol=1e-6)
