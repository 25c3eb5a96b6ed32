"""Arithmetic of delta weights, shared by `make_delta` and `apply_delta` (spec/model.md §12).

A delta is target - base, computed in float32 and cast once. Word embeddings may have more rows in the target (image
tokens): the base's block is subtracted, the rest kept. Projector and tower, which a base lacks, are kept as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from llava.errors import CheckpointError, ConfigError
from llava.files import atomic_directory
from llava.model import checkpoint as ckpt
from llava.model.saving import copy_side_files, write_weights
from llava.model.source import WeightSource
from llava.placement import DTYPES

OWN: Final = (*ckpt.PROJECTOR_PREFIXES, *ckpt.TOWER_PREFIXES)
GROWING: Final = (*ckpt.EMBEDDINGS, "lm_head.weight")
DROPPED: Final = "rotary_emb.inv_freq"
Tensors = Iterator[tuple[str, Tensor]]
Combine = Callable[[str, Tensor, Tensor | None], Tensor]


def check_pair(base: WeightSource, other: WeightSource) -> None:
    """Refuse two directories that are not a base and its relative, by names and shapes, before any weights are read."""
    for name, shape in other.shapes.items():
        below = base.shapes.get(name)
        if below is None and not name.startswith(OWN) and DROPPED not in name:
            raise CheckpointError(
                f"{other.path} has {name}, which {base.path} lacks and which is no part of projector or tower; give "
                "the base this model was made from."
            )
        fits = below in (None, shape) or (
            name in GROWING and len(below or ()) == len(shape) and all(b <= s for b, s in zip(below or (), shape))
        )
        if not fits:
            raise CheckpointError(f"{name} is {below} in {base.path}, but {shape} in {other.path}; they do not match.")
    lost = [name for name in base.shapes if name not in other.shapes and DROPPED not in name]
    if lost:
        raise CheckpointError(f"{other.path} lacks {lost[0]}, which {base.path} has; it was not made from this base.")


def check_differences(base: WeightSource, delta: WeightSource) -> None:
    """Refuse a whole model in place of a delta: its last norm is near the base's, a difference is near 0."""
    for name in delta.shapes.keys() & base.shapes.keys() & set(ckpt.FINAL_NORMS):
        found = delta.read(name).float()
        if bool((found - base.read(name).float()).abs().sum() < found.abs().sum()):
            raise CheckpointError(
                f"{delta.path} holds a model, not differences from {base.path} (its last norm is near that of the "
                "base); give the directory of the delta."
            )


def shifted(tensor: Tensor, base: Tensor, sign: int) -> Tensor:
    """`tensor + sign * base` in float32; where the base is smaller, on its leading block."""
    result = tensor.float()
    result = result.clone() if result is tensor else result
    result[tuple(slice(0, size) for size in base.shape)] += sign * base.float()
    return result


def combine(base: WeightSource, other: WeightSource, rule: Combine) -> Tensors:
    """`rule(name, tensor, base's tensor or None)` for every weight of `other`, shard by shard."""
    for name, tensor in ckpt.iter_tensors(other.path, lambda name: DROPPED not in name):
        if tensor is not None:
            yield name, rule(name, tensor, base.read(name) if name in base.shapes else None)


def write(source: Path, output: str | Path, tensors: Tensors, verify: Callable[[Path], Any]) -> Any:
    """Write `tensors` and the side files of `source` to the new directory `output`; kept if `verify` raises nothing."""
    with atomic_directory(output) as directory:
        copy_side_files(source, directory)
        write_weights(directory, tensors)
        return verify(directory)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that both programs share."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--base-model-path", required=True, help="directory of the language model, e.g. LLaMA")
    arguments.add_argument("--target-model-path", required=True, help="directory of the chat model")
    arguments.add_argument("--delta-path", required=True, help="directory of the delta")
    return arguments


def named_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"Unknown dtype {name!r}; use float16, bfloat16 or float32.")
    return DTYPES[name]


def upload(directory: str | Path, repository: str) -> None:
    """Push a directory to the hub; the error of a refusal names what the hub said."""
    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=str(directory))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is written, but {repository} did not take it: {error}") from error
