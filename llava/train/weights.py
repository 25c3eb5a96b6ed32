"""What training writes, checked: all weights, or the projector alone; and reading it back (spec/train.md §10).

What a LoRA run writes is in `llava.train.model_setup`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.errors import CheckpointError
from llava.files import atomic_write
from llava.model.checkpoint import ADAPTER_CONFIG, PROJECTOR_FILE, has_weights, load_bin, weight_shapes
from llava.model.lora import ADAPTER_PREFIX, adapter_shapes, read_non_lora
from llava.train import zero

POSITION_EMBEDDING = "vision_tower.embeddings.position_embedding"
Named = list[tuple[str, torch.nn.Parameter]]


def projector_parameters(model: torch.nn.Module, config: Any) -> Named:
    """The parameters of a projector-only file, by full name: the projector, plus what its flags made trainable."""
    keys = ["mm_projector", "vision_resampler"]
    if getattr(config, "mm_use_im_start_end", False):
        keys += ["embed_tokens", "embed_in", "wte"]
    if getattr(config, "tune_vit_pos_embedding", False):
        keys.append(POSITION_EMBEDDING)
    return [(name, p) for name, p in model.named_parameters() if any(key in name for key in keys)]


def all_tensors(model: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Every whole parameter and persistent buffer, on the CPU; collective under ZeRO-3, empty without `keep`."""
    state = zero.collect(model.named_parameters(), keep=keep)
    if keep:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state |= {k: v.detach().cpu() for k, v in model.state_dict().items() if k not in parameters}
    return state


def shapes(named: Named) -> dict[str, tuple[int, ...]]:
    return {name: zero.full_shape(parameter) for name, parameter in named}


def projector_file(output_dir: Path, *, final: bool) -> Path:
    """`mm_projector.bin`; the last save of a run whose folder is called checkpoint-* goes beside it instead."""
    if final and output_dir.name.startswith("checkpoint-"):
        return output_dir.parent / "mm_projector" / f"{output_dir.name}.bin"
    return output_dir / PROJECTOR_FILE


def write_bin(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A file of tensors that is there whole or not at all."""
    with atomic_write(path) as part:
        torch.save(state, part)


def copy_named(
    parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, torch.Tensor], source: str = "The projector file"
) -> None:
    """Copy a file's tensors into the parameters of the same names (not partitioned ones); all must be there and fit."""
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise CheckpointError(f"{source} has tensors this model lacks: {', '.join(unknown[:4])}.")
    with torch.no_grad():
        for name, value in state.items():
            if parameters[name].shape != value.shape:
                found, wanted = tuple(value.shape), tuple(parameters[name].shape)
                raise CheckpointError(f"{source}: {name} is {found}, but this model needs {wanted}.")
            parameters[name].copy_(value)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a directory: all of a model's, or those of its projector file or adapter."""
    if (directory / ADAPTER_CONFIG).is_file():
        beside = {ADAPTER_PREFIX + name: tuple(value.shape) for name, value in read_non_lora(directory).items()}
        return adapter_shapes(directory) | beside
    if not has_weights(directory) and (directory / PROJECTOR_FILE).is_file():
        return {name: tuple(value.shape) for name, value in load_bin(directory / PROJECTOR_FILE).items()}
    return weight_shapes(directory)


def verify(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Re-open what was just saved: all expected names, with the model's shapes, none of size zero (SAVE-4)."""
    found = stored_shapes(directory)
    missing = sorted(set(expected) - set(found))
    wrong = sorted(k for k in set(expected) & set(found) if tuple(expected[k]) != found[k])
    empty = sorted(k for k, shape in found.items() if 0 in shape)
    if missing or wrong or empty:
        what = ", ".join(
            f"{len(names)} {word} ({names[0]})"
            for word, names in (("missing", missing), ("of another shape", wrong), ("empty", empty))
            if names
        )
        raise CheckpointError(f"The weights just saved to {directory} are not those of the model: {what}.")
