"""Merge a LoRA adapter into its base: `python scripts/merge_lora_weights.py --model-path A --model-base B
--save-model-path OUT`.

The merge is computed in float32 on the CPU and saved, with the vision tower, in the dtype of the base. It is verified:
the merged model must have the logits of base plus adapter on a fixed image and prompt, some weight must change, and the
directory must load as the model in memory. Otherwise the exit status is 2 and nothing is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.errors import CheckpointError
from llava.files import atomic_directory
from llava.model import builder, lora
from llava.model import checkpoint as ckpt
from llava.model.chat_template import set_chat_template
from llava.model.checkpoint import Checkpoint, Kind
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.quantization import PREFIXES
from llava.model.registry import language_model_spec
from llava.model.tokenizer import load_tokenizer
from llava.model.verification import cast_parameters, check_logits, probe_logits
from llava.placement import resolve_attention
from llava.utils import guarded

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merged:
    """Result of `merge`: the dtype saved, the number of weights changed, and the largest differences of logits."""

    dtype: torch.dtype
    changed: int
    merge_error: float
    rounding: float


def load_unmerged(found: Checkpoint, base: Checkpoint) -> tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM]:
    """The tokenizer, and the base with tower and fully trained weights of the run, in float32, without the adapter."""
    config = builder.model_config(found, None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of a QLoRA run: merged weights are not quantized
    config._attn_implementation = resolve_attention(
        CPU, torch.float32, None, language_model_spec(base.model_type, str(base.path)).attention
    )
    tokenizer = load_tokenizer(base.path)
    model = builder.language_model(found, base, config, torch.float32, CPU, None)
    builder.add_image_tokens(model, tokenizer, config)
    lora.load_non_lora(model, found.path)
    builder.load_tower(model.get_model().vision_tower, found, base, torch.float32, CPU)
    return tokenizer, model.eval()


def base_dtype(base: Checkpoint) -> torch.dtype:
    """The dtype of the stored word embeddings of the base."""
    tensors = ckpt.iter_tensors(base.path, lambda name: name in ckpt.EMBEDDINGS)
    found = next((tensor for _, tensor in tensors), None)
    if found is None:
        raise CheckpointError(f"{base.path} holds no word embeddings ({' or '.join(ckpt.EMBEDDINGS)}).")
    return found.dtype


def changed_weights(model: LlavaLlamaForCausalLM, base: Checkpoint, *, tower: bool) -> int:
    """The number of weights of decoder and head, with `tower` also of the vision tower, that differ from those stored.

    Stored weights are compared in the dtype of the model.
    """
    parameters = dict(model.named_parameters())

    def differs(name: str, tensor: Tensor) -> bool:
        weight = parameters.get(name)
        return weight is not None and not torch.equal(weight[: tensor.shape[0]], tensor.to(weight.dtype))

    tensors = ckpt.iter_tensors(base.path, lambda name: name.startswith((*PREFIXES, "lm_head.")))
    changed = sum(differs(name, tensor) for name, tensor in tensors)
    vision = model.get_vision_tower()
    if not tower or vision is None:
        return changed
    source, prefix, _ = vision.source(from_checkpoint=True)
    core = f"{model.base_model_prefix}.vision_tower.vision_tower."
    stored = ckpt.iter_tensors(source, lambda name: name.startswith(prefix))
    return changed + sum(differs(core + name.removeprefix(prefix), tensor) for name, tensor in stored)


def merge(model_path: str | Path, model_base: str | Path | None, save_model_path: str | Path) -> Merged:
    """Merge, save and verify. `model_base` defaults to the base named in the adapter's configuration."""
    found = ckpt.inspect(builder.local_directory(model_path))
    if found.kind is not Kind.LORA:
        raise CheckpointError(f"{found.path} holds {found.kind.value}; only a LoRA adapter can be merged.")
    base = builder.resolve_base(found, model_base)
    assert base is not None  # an adapter has one
    with atomic_directory(save_model_path) as directory:
        tokenizer, model = load_unmerged(found, base)
        processor = model.get_model().vision_tower.image_processor
        adapted = lora.attach_adapter(model, found.path).eval()
        expected = probe_logits(adapted, tokenizer, processor)
        model = cast("LlavaLlamaForCausalLM", lora.merge_adapter(adapted, found.path))
        merge_error = check_logits(
            probe_logits(model, tokenizer, processor), expected, "The merged and the unmerged model"
        )

        dtype = base_dtype(base)
        cast_parameters(model, dtype)
        changed = changed_weights(model, base, tower=lora.adapts_tower(lora.adapter_shapes(found.path)))
        if not changed:
            raise CheckpointError(
                f"Merging {found.path} does not change any weight of {base.path} (in {dtype}): the adapter is "
                "untrained, or the base is already merged; nothing was written."
            )
        save(model, tokenizer, directory)
        cast_parameters(model, torch.float32)
        in_memory = probe_logits(model, tokenizer, processor)
        del model, adapted
        saved_tokenizer, saved, saved_processor, _ = builder.load_pretrained_model(
            directory, device="cpu", dtype=torch.float32
        )
        if not torch.equal(probe_logits(saved, saved_tokenizer, saved_processor), in_memory):
            raise CheckpointError(
                "The directory written does not load as the merged model in memory; nothing was kept."
            )
    return Merged(dtype, changed, merge_error, float((in_memory - expected).abs().max()))


def save(model: LlavaLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save the model as a full checkpoint, with the tower and its settings."""
    model.config._name_or_path = ""
    tower = model.get_vision_tower()
    assert tower is not None
    model.config.mm_vision_tower_config = tower.settings
    model.save_pretrained(directory, safe_serialization=True)
    set_chat_template(tokenizer, model.config)
    tokenizer.save_pretrained(directory)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="directory of the adapter")
    parser.add_argument("--model-base", help="the language model (default: the one named in adapter_config.json)")
    parser.add_argument("--save-model-path", required=True, help="new directory for the merged model")
    args = parser.parse_args(argv)
    done = merge(args.model_path, args.model_base, args.save_model_path)
    print(  # noqa: T201 (a program)
        f"{args.save_model_path}: {done.changed} weights changed, saved as {str(done.dtype).removeprefix('torch.')}; "
        f"logits on the probe differ by {done.merge_error:.1e}, after rounding to this dtype by {done.rounding:.1e}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
