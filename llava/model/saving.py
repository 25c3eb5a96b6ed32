"""Writing checkpoint directories that are whole or not there at all: shards streamed, then one rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import CheckpointError
from llava.mm_utils import tokenizer_image_token
from llava.model.checkpoint import INDEX_FILES, SINGLE_FILES

SHARD_BYTES: Final = 5 * 10**9
SIDE_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a stream of named tensors as safetensors, holding one shard at a time; an index when there are several."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size, total = 0, 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}"
        save_file(held, path, metadata={"format": "pt"})
        shards.append((path, sorted(held)))
        held.clear()

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if held and size + count > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size, total = size + count, total + count
    if not held and not shards:
        raise CheckpointError(f"No weights were left to write into {directory}.")
    flush()
    if len(shards) == 1:
        shards[0][0].rename(directory / SINGLE_FILES[0])
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(file)
        weight_map.update(dict.fromkeys(names, file.name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILES[0]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters, and not the buffers: rotary tables, which no checkpoint holds, keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def write_config(directory: Path, settings: dict[str, object]) -> None:
    (directory / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_side_files(source: Path, directory: Path) -> None:
    """Copy what belongs to a model besides its weights: configuration, tokenizer, processor."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


# --- A fixed image and question put to a model ------------------------------------------------------------------------


PROMPT: Final = f"USER: {DEFAULT_IMAGE_TOKEN}\nWhat color is the shape? ASSISTANT: The shape is red."
TOLERANCE: Final = 1e-3


def probe_inputs(tokenizer: Any, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Ids `(1, T)` with one placeholder -200, and pixels `(1, 3, S, S)` with structure in all directions."""
    side = image_processor.crop_size["height"]
    x = torch.linspace(-2.0, 2.0, side)
    pixels = torch.stack([torch.sin(3 * x)[:, None] * torch.cos(k * x)[None, :] + x[None, :] for k in (1, 2, 5)])
    ids = torch.tensor([tokenizer_image_token(PROMPT, tokenizer)])
    return ids, pixels.unsqueeze(0)


@torch.no_grad()
def probe(model: Any, tokenizer: Any, image_processor: Any) -> Tensor:
    """Logits `(L, V)` in float32 over the spliced probe."""
    ids, pixels = probe_inputs(tokenizer, image_processor)
    logits: Tensor = model(input_ids=ids, images=pixels).logits
    return logits[0].float()


def compare(found: Tensor, expected: Tensor, what: str) -> float:
    """The largest difference of two probes; more than `TOLERANCE` of the largest logit is a `CheckpointError`."""
    error = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not error <= TOLERANCE * scale:  # also when it is not a number
        raise CheckpointError(
            f"{what} do not agree: logits on the fixed probe differ by {error:.3g} (largest logit {scale:.3g}); "
            "nothing was written."
        )
    return error
