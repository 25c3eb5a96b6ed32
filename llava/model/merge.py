"""Merge a LoRA adapter into its base: `python scripts/merge_lora_weights.py --model-path A --model-base B
--save-model-path OUT`.

Merged in float32 on the CPU, saved in the base's dtype with its tower, and verified (users.md LORA-3): the merged
model must answer a fixed probe as base and adapter do, some weight must have changed, and what was written must load
as the model in memory. Otherwise the exit status is 2 and there is no directory.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.files import atomic_directory
from llava.model import builder, lora
from llava.model import checkpoint as ckpt
from llava.model.checkpoint import Checkpoint, Kind
from llava.model.quantization import PREFIXES
from llava.model.registry import language_model_spec
from llava.model.saving import cast_parameters, compare, probe
from llava.model.tokenizer import load_tokenizer
from llava.placement import resolve_attention
from llava.utils import guarded

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merged:
    """What `merge` did: the dtype saved, how many weights changed, and the largest differences on the probe."""

    dtype: torch.dtype
    changed: int
    merge_error: float
    rounding: float


def unmerged(found: Checkpoint, base: Checkpoint) -> tuple[Any, Any]:
    """Tokenizer, and the base in float32 with the run's fully trained weights and its tower, without the adapter."""
    config = builder.model_config(found, None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of a QLoRA run: the merged weights are not packed (LORA-4)
    config._attn_implementation = resolve_attention(
        CPU, torch.float32, None, language_model_spec(base.model_type, str(base.path)).attention
    )
    tokenizer = load_tokenizer(base.path)
    model = builder.language_model(found, base, config, torch.float32, CPU, None)
    builder.add_image_tokens(model, tokenizer, config)
    lora.load_non_lora(model, found.path)
    model.get_model().vision_tower.load_model(dtype=torch.float32, device=CPU)
    return tokenizer, model.eval()


def base_dtype(base: Checkpoint) -> torch.dtype:
    """The dtype that the base's own weights are stored in."""
    tensors = ckpt.iter_tensors(base.path, lambda name: name in ckpt.EMBEDDINGS)
    found = next((tensor for _, tensor in tensors if tensor is not None), None)
    if found is None:
        raise CheckpointError(f"{base.path} holds no word embeddings ({' or '.join(ckpt.EMBEDDINGS)}).")
    return found.dtype


def changed_weights(model: Any, base: Checkpoint) -> int:
    """How many of the base's matrices differ from the model's, which is in the base's dtype by now."""
    parameters = dict(model.named_parameters())

    def differs(name: str, tensor: Tensor) -> bool:
        return name in parameters and not torch.equal(parameters[name][: tensor.shape[0]], tensor)

    tensors = ckpt.iter_tensors(base.path, lambda name: name.startswith((*PREFIXES, "lm_head.")))
    return sum(differs(name, tensor) for name, tensor in tensors if tensor is not None)


def merge(model_path: str | Path, model_base: str | Path | None, save_model_path: str | Path) -> Merged:
    """Merge, save and verify. `model_base` defaults to the base that the adapter names."""
    found = ckpt.inspect(builder.local_directory(model_path))
    if found.kind is not Kind.LORA:
        raise CheckpointError(f"{found.path} holds {found.kind.value}; only a LoRA adapter can be merged.")
    base = builder.resolve_base(found, model_base)
    assert base is not None  # an adapter has one
    with atomic_directory(save_model_path) as directory:
        tokenizer, model = unmerged(found, base)
        processor = model.get_model().vision_tower.image_processor
        adapted = lora.attach_adapter(model, found.path).eval()
        expected = probe(adapted, tokenizer, processor)
        model = lora.merge_adapter(adapted, found.path)
        merge_error = compare(probe(model, tokenizer, processor), expected, "The merged and the unmerged model")

        dtype = base_dtype(base)
        cast_parameters(model, dtype)
        changed = changed_weights(model, base)
        if not changed:
            raise CheckpointError(
                f"Merging {found.path} changes no weight of {base.path} (in {dtype}): the adapter is untrained, or the "
                "base is already merged; nothing was written."
            )
        save(model, tokenizer, directory)
        cast_parameters(model, torch.float32)
        in_memory = probe(model, tokenizer, processor)
        del model, adapted
        saved_tokenizer, saved, saved_processor, _ = builder.load_pretrained_model(
            directory, device="cpu", dtype=torch.float32
        )
        if not torch.equal(probe(saved, saved_tokenizer, saved_processor), in_memory):
            raise CheckpointError("What was written does not load as the merged model in memory; nothing was kept.")
    return Merged(dtype, changed, merge_error, float((in_memory - expected).abs().max()))


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write the model with its tower and the tower's settings, as a full checkpoint."""
    model.config._name_or_path = ""
    model.config.mm_vision_tower_config = model.get_vision_tower().settings
    generation = model.generation_config
    if not generation.do_sample and (generation.temperature != 1.0 or generation.top_p != 1.0):
        generation.do_sample = True  # published Vicunas have sampling settings without it, and could not be saved
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="directory of the adapter")
    parser.add_argument("--model-base", help="its language model; the one the adapter names when not given")
    parser.add_argument("--save-model-path", required=True, help="directory to make")
    args = parser.parse_args(argv)
    done = merge(args.model_path, args.model_base, args.save_model_path)
    print(  # noqa: T201 (a program)
        f"{args.save_model_path}: {done.changed} weights changed, saved as {str(done.dtype).removeprefix('torch.')}; "
        f"on the probe the merge differs by {done.merge_error:.1e}, with rounding to this dtype by {done.rounding:.1e}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
