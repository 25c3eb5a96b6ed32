"""Export a checkpoint for other programs: `llava export --format FORMAT --model-path DIR --output OUT`.

`hf-llava` is the layout of transformers' `LlavaForConditionalGeneration`. The result is loaded with that class and must
give the logits of the source on a fixed image and prompt. `gguf` is the format of llama.cpp: `model-TYPE.gguf`,
and `mmproj-TYPE.gguf` with tower and projector. Both support LLaMA with a CLIP tower and an `mlp2x_gelu` projector;
gguf also supports language models.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    LlamaTokenizer,
    LlamaTokenizerFast,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import template_for
from llava.errors import ConfigError
from llava.files import atomic_directory, write_text
from llava.mm_utils import get_model_name_from_path
from llava.model import gguf_export
from llava.model.builder import load_pretrained_model, local_directory, read_config
from llava.model.chat_template import set_chat_template
from llava.model.checkpoint import PROJECTOR_PREFIXES, TOWER_PREFIXES, Checkpoint, inspect
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import is_eva
from llava.model.registry import language_model_spec
from llava.model.saving import savable_generation_config, write_json, write_weights
from llava.model.tokenizer import FAST_FILE, TEMPLATE
from llava.model.verification import cast_parameters, check_logits, probe_inputs, probe_logits
from llava.utils import guarded

READERS: Final = {"hf-llava": "LlavaForConditionalGeneration", "gguf": "llama.cpp"}
RENAMED: Final = (
    (TOWER_PREFIXES[0], "vision_tower."),
    (f"{PROJECTOR_PREFIXES[0]}0.", "multi_modal_projector.linear_1."),
    (f"{PROJECTOR_PREFIXES[0]}2.", "multi_modal_projector.linear_2."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
REMARKS: Final = {  # after "only"
    "hf-llava": ".",
    "gguf": " (its InternVL projector shuffles pixels). Export the language model with --text-only.",
}
STRATEGY: Final = {"patch": "default", "cls_patch": "full"}
LLAVA_KEYS: Final = (
    *("mm_", "tune_", "freeze_", "image_", "use_mm_proj", "conv_template"),
    *("architectures", "_name_or_path", "quantization_config"),
)


def check_exportable(found: Checkpoint, target: str) -> None:
    """Raise `ConfigError`, before weights are read, for a model that programs reading the format `target` cannot run.

    Directories without a chat model are left to the loader.
    """
    if "mm_vision_tower" not in found.config:
        return
    config = read_config(found)
    tower = build_vision_tower(config, found.path, delay_load=True)
    kind = "EVA-CLIP" if is_eva(tower.settings) else str(tower.settings.get("model_type"))
    projector = getattr(config, "mm_projector_type", None) or "linear"
    reason = None
    if language_model_spec(found.model_type, str(found.path)).config is not LlavaConfig:
        reason = f"its language model is {found.model_type}"
    elif kind not in ("clip", "clip_vision_model"):
        reason = f"its vision tower is {kind}"
    elif projector != "mlp2x_gelu":
        reason = f"its projector is {projector}, not mlp2x_gelu"
    elif getattr(config, "mm_use_im_start_end", False):
        reason = "it wraps images in <im_start> and <im_end>"
    if reason:
        raise ConfigError(
            f"{found.path} cannot be exported as {target}, because {reason}; {READERS[target]} supports LLaMA with a "
            f"CLIP tower and a two-layer projector only{REMARKS[target]} Serve it with llava instead."
        )


def hf_name(name: str) -> str:
    """The name in `LlavaForConditionalGeneration` of a weight of this package."""
    old, new = next(pair for pair in RENAMED if name.startswith(pair[0]))
    return new + name.removeprefix(old)


def append_mean(table: Tensor) -> Tensor:
    """Append the mean row to a table `(V, D)`: in a head, its logit is never the largest."""
    return torch.cat([table, table.float().mean(dim=0, keepdim=True).to(table.dtype)])


def hf_weights(model: LlavaLlamaForCausalLM, dtype: torch.dtype, image_token: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its new name; the embedding and the head have at least `image_token + 1` rows."""
    tower = model.get_vision_tower()
    assert tower is not None
    rest = {f"model.vision_tower.{name}": tensor for name, tensor in tower.unused_tensors().items()}
    for name, tensor in {**model.state_dict(), **rest}.items():
        if name.endswith("position_ids") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight") and tensor.shape[0] <= image_token:
            tensor = append_mean(tensor)
        yield hf_name(name), tensor.to(dtype)


def hf_config(
    model: LlavaLlamaForCausalLM, dtype: torch.dtype, image_token: int, pad_token: int
) -> transformers.LlavaConfig:
    tower, config = model.get_vision_tower(), model.config
    assert tower is not None
    text = {
        key: value for key, value in config.to_dict().items() if not key.startswith(LLAVA_KEYS) and key != "model_type"
    }
    text["vocab_size"] = max(config.vocab_size, image_token + 1)
    vision = {key: value for key, value in tower.settings.items() if key != "model_type"}
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=image_token,
        pad_token_id=pad_token,
        vocab_size=text["vocab_size"],
        vision_feature_layer=tower.select_layer,
        vision_feature_select_strategy=STRATEGY[tower.select_feature],
        architectures=[LlavaForConditionalGeneration.__name__],
        torch_dtype=dtype,
    )


def processor_settings(model: LlavaLlamaForCausalLM) -> dict[str, object]:
    """The settings of `LlavaProcessor`, from which it computes the number of image tokens: CLIP has one class token."""
    tower = model.get_vision_tower()
    assert tower is not None
    return {
        "processor_class": "LlavaProcessor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": tower.spec.vision(tower.config).patch_size,
        "vision_feature_select_strategy": STRATEGY[tower.select_feature],
    }


@torch.no_grad()
def hf_logits(
    directory: Path, tokenizer: PreTrainedTokenizerBase, processor: CLIPImageProcessor, image_token: int
) -> Tensor:
    """Logits `(L, V)` on the probe of `LlavaForConditionalGeneration`, loaded from `directory`."""
    model: nn.Module = LlavaForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()
    ids, pixels = probe_inputs(tokenizer, processor)
    ids = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, image_token)
    logits: Tensor = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    return logits[0].float()


def export(
    model_path: str | Path, output: str | Path, model_base: str | Path | None = None, conv_mode: str | None = None
) -> float:
    """Write `hf-llava` to the new directory `output`, and return the largest difference between logits."""
    source = local_directory(model_path)
    check_exportable(inspect(source), "hf-llava")
    with atomic_directory(output) as directory:
        tokenizer, model, processor, _ = load_pretrained_model(
            source, model_base, device="cpu", dtype=torch.float32, attn_implementation="eager"
        )
        dtype = getattr(torch, str(model.config.torch_dtype).removeprefix("torch."), torch.float32)
        cast_parameters(model, dtype)
        cast_parameters(model, torch.float32)
        expected = probe_logits(model, tokenizer, processor)
        tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
        image_token = int(tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))
        pad_token = next(i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, 0) if i is not None)
        hf_config(model, dtype, image_token, pad_token).save_pretrained(directory)
        write_weights(directory, hf_weights(model, dtype, image_token))
        model.config.conv_template = template_for(model.config, get_model_name_from_path(str(model_path)), conv_mode)
        set_chat_template(tokenizer, model.config)
        tokenizer.save_pretrained(directory)
        if isinstance(tokenizer, LlamaTokenizer):  # for programs without sentencepiece
            fast = LlamaTokenizerFast.from_pretrained(directory, from_slow=True)
            fast.backend_tokenizer.save(str(directory / FAST_FILE))
        write_text(directory / TEMPLATE, tokenizer.chat_template)  # of the processor of transformers 5
        cast("CLIPImageProcessor", processor).save_pretrained(directory)
        write_json(directory / "processor_config.json", processor_settings(model))
        if isinstance(model.generation_config, transformers.GenerationConfig):
            savable_generation_config(model.generation_config).save_pretrained(directory)
        del model
        found = hf_logits(directory, tokenizer, processor, image_token)
        return check_logits(found[:, : expected.shape[1]], expected, "The export and its source")


def export_gguf(args: argparse.Namespace) -> str:
    """Write `gguf`, and return a report."""
    if not args.text_only:
        check_exportable(inspect(local_directory(args.model_path)), "gguf")
    files, stop = gguf_export.export(
        args.model_path, args.output, args.model_base, outtype=args.outtype or "f16", conv_mode=args.conv_mode,
        text_only=args.text_only,
    )  # fmt: skip
    flags = "".join(f" {flag} {file}" for flag, file in zip(("-m", "--mmproj"), files))
    stops = f" -r {shlex.quote(stop)}" if stop else ""
    return f"Written and read back. Run llama.cpp with{flags} --jinja{stops}."


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", required=True, choices=READERS, help="the format to write")
    parser.add_argument("--model-path", required=True, help="directory of the checkpoint")
    parser.add_argument("--model-base", help="the language model of a projector or adapter")
    parser.add_argument("--output", required=True, help="new directory for the export")
    parser.add_argument("--conv-mode", help="conversation template of the chat template (default: the checkpoint's)")
    parser.add_argument("--outtype", choices=gguf_export.OUTTYPES, help="type of the weights in gguf (default: f16)")
    parser.add_argument("--text-only", action="store_true", help="gguf without tower and projector")
    args = parser.parse_args(argv)
    if args.format == "gguf":
        report = export_gguf(args)
    elif args.outtype or args.text_only:
        raise ConfigError("--outtype and --text-only belong to --format gguf; remove them.")
    else:
        error = export(args.model_path, args.output, args.model_base, args.conv_mode)
        report = (
            f"{args.output}: LlavaForConditionalGeneration has the same logits to within {error:.1e}. Its processor "
            "crops images; pad them to squares first if image_aspect_ratio is pad."
        )
    print(report)  # noqa: T201 (a program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
