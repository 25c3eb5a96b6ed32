"""Export to GGUF for llama.cpp: the language model as one file, CLIP tower and projector as another.

Weights are read, converted and written one at a time. Matrices get the type of `--outtype`, or float16 if q8_0 cannot
divide their rows into blocks; vectors and position embeddings are float32, and patch kernels float16 or float32.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from llava.conversation import get_template, stop_strings, template_for
from llava.errors import CheckpointError, ConfigError
from llava.files import atomic_directory
from llava.mm_utils import get_model_name_from_path
from llava.model import builder
from llava.model import checkpoint as ckpt
from llava.model.chat_template import set_chat_template
from llava.model.check import language_parts, tower_part
from llava.model.checkpoint import Checkpoint, Kind
from llava.model.config import context_length
from llava.model.gguf_vocab import add_vocabulary, end_tokens
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.saving import WeightSource
from llava.model.tokenizer import load_tokenizer
from llava.utils import require

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

OUTTYPES: Final = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ACTIVATIONS: Final = {"quick_gelu": False, "gelu": True}  # of the tower: `clip.use_gelu`
FEATURE_LAYER: Final = "clip.vision.feature_layer"
CLASS_TOKENS: Final = 1


@dataclass(frozen=True)
class Weight:
    """A tensor of a GGUF file: its name and shape there, and how to read it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def tensor_type(weight: Weight, outtype: str) -> GGMLQuantizationType:
    """The type of a weight in a file of `outtype`."""
    types = require("gguf", "export").GGMLQuantizationType
    if len(weight.shape) == 1 or "position_embd" in weight.name:
        return types.F32
    if len(weight.shape) > 2:
        return types.F16 if outtype == "f16" else types.F32
    if outtype == "q8_0" and weight.shape[-1] % 32:
        return types.F16
    return types[outtype.upper()]


def encode(weight: Weight, outtype: str) -> NDArray[np.generic]:
    """The bytes of a weight. Raises `ConfigError` for values that its type cannot hold."""
    gguf = require("gguf", "export")
    values = weight.read().to(torch.float32).contiguous().numpy()
    kind = tensor_type(weight, outtype)
    with np.errstate(over="ignore", invalid="ignore"):
        data: NDArray[np.generic] = gguf.quants.quantize(values, kind)
    if not np.isfinite(values).all() or (data.dtype == np.float16 and not np.isfinite(data).all()):
        raise ConfigError(
            f"{weight.name} has values out of the range of {kind.name.lower()}, or not finite; use --outtype bf16 or "
            "f32."
        )
    return data


def write_file(
    path: Path, arch: str, fill: Callable[[GGUFWriter], None], weights: Sequence[Weight], outtype: str
) -> None:
    """Write a GGUF file, its metadata by `fill(writer)`, then read it back and compare names and contents.

    Raises `CheckpointError` if they differ.
    """
    gguf = require("gguf", "export")
    writer = gguf.GGUFWriter(path, arch)
    try:
        fill(writer)
        writer.add_file_type(gguf.LlamaFileType[OUTTYPES[outtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for weight in weights:
            kind = tensor_type(weight, outtype)
            size = gguf.quants.quant_shape_to_byte_shape(weight.shape, kind)
            writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), int(np.prod(size)), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sums = []
        for weight in weights:
            data = encode(weight, outtype)
            sums.append((weight.name, zlib.crc32(data.data)))
            writer.write_tensor_data(data)
    finally:
        writer.close()
    written = [
        (tensor.name, zlib.crc32(np.ascontiguousarray(tensor.data).data)) for tensor in gguf.GGUFReader(path).tensors
    ]
    if written != sums:
        raise CheckpointError(f"{path.name} does not read back as it was written; nothing was kept.")


# --- Language model ---------------------------------------------------------------------------------------------------


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows (or biases) of q or k in the order of llama.cpp, which interleaves the two halves of each rotary pair."""
    return rearrange(weight, "(h half d) ... -> (h d half) ...", h=heads, half=2)


def language_weights(source: Path, config: PretrainedConfig) -> Iterator[Weight]:
    """The weights of a LLaMA model by their GGUF names."""
    gguf = require("gguf", "export")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = WeightSource(source)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def reader(name: str) -> Callable[[], Tensor]:
        rotary = next((count for part, count in heads.items() if f".{part}." in name), None)
        return lambda: stored.read(name) if rotary is None else interleave(stored.read(name), rotary)

    for name, shape in stored.shapes.items():
        skipped = (*ckpt.TOWER_PREFIXES, *ckpt.PROJECTOR_PREFIXES, *(["lm_head."] * config.tie_word_embeddings))
        if not name.startswith(skipped) and not name.endswith("rotary_emb.inv_freq"):
            yield Weight(names.get_name(name, try_suffixes=(".weight", ".bias")), shape, reader(name))


def add_language_model(writer: GGUFWriter, config: PretrainedConfig, rows: int) -> None:
    gguf = require("gguf", "export")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_vocab_size(rows)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)


# --- Tower and projector ----------------------------------------------------------------------------------------------


def vision_weights(found: Checkpoint, tower: VisionTower) -> Iterator[Weight]:
    """The weights of a CLIP tower up to the layer of the features, and of a two-layer projector."""
    gguf = require("gguf", "export")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, tower.depth)
    directory, prefix, _ = tower.source(from_checkpoint=True)
    stored = WeightSource(directory)

    def reader(source: WeightSource, name: str) -> Callable[[], Tensor]:
        return lambda: source.read(name)

    for name, shape in stored.shapes.items():
        if name.startswith(prefix) and tower.needs(name, prefix):
            key = names.get_name(f"vision_tower.{name.removeprefix(prefix)}", try_suffixes=(".weight", ".bias"))
            yield Weight(key, shape, reader(stored, name))
    full = found.kind is Kind.FULL
    stored = WeightSource(found.path if full else ckpt.tensor_file(found.path / ckpt.PROJECTOR_FILE))
    for name, shape in stored.shapes.items():
        if "mm_projector." in name:
            yield Weight(f"mm.{name.split('mm_projector.', 1)[1]}", shape, reader(stored, name))


def add_vision(writer: GGUFWriter, config: PretrainedConfig, tower: VisionTower) -> None:
    gguf = require("gguf", "export")
    vision, processor = tower.spec.vision(tower.config), tower.image_processor
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.hidden_size)
    writer.add_vision_image_size(processor.crop_size["height"])
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(tower.depth)
    # Without this key, llama.cpp skips the last layer of the file.
    writer.add_array(FEATURE_LAYER, [tower.depth])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([float(value) for value in processor.image_mean])
    writer.add_vision_image_std([float(value) for value in processor.image_std])
    writer.add_vision_use_gelu(ACTIVATIONS[vision.hidden_act])


# --- Export -----------------------------------------------------------------------------------------------------------


class Exported(NamedTuple):
    """Files of an export, and the stop string if it is not a token and therefore not in the files."""

    files: list[Path]
    stop: str | None


def refuse(found: Checkpoint, reason: str | None) -> None:
    """Raise `ConfigError` if there is a `reason` why llama.cpp would not compute the same as the model."""
    if reason:
        raise ConfigError(f"{found.path} cannot be exported as gguf, because {reason}. Serve it with llava instead.")


def language_problem(found: Checkpoint, config: PretrainedConfig) -> str | None:
    if not isinstance(config, LlavaConfig):
        return f"its language model is {found.model_type}, not LLaMA"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    scaling = (config.rope_scaling or {}).get("type", "linear")
    return None if scaling == "linear" else f"its rotary embedding has {scaling} scaling"


def tower_problem(tower: VisionTower) -> str | None:
    vision, size = tower.spec.vision(tower.config), tower.image_processor.crop_size["height"]
    if tower.select_feature != "patch":
        return "its image features include the class token (mm_vision_select_feature)"
    if vision.hidden_act not in ACTIVATIONS:
        return f"the activation of its vision tower is {vision.hidden_act}"
    fits = tower.source(from_checkpoint=True)[2] == (size // vision.patch_size) ** 2 + CLASS_TOKENS
    return None if fits else f"its vision tower has no positions for images of {size} px"


def export(
    model_path: str | Path,
    output: str | Path,
    model_base: str | Path | None = None,
    *,
    outtype: str = "f16",
    conv_mode: str | None = None,
    text_only: bool = False,
) -> Exported:
    """Write `model-OUTTYPE.gguf` and, for a chat model, `mmproj-OUTTYPE.gguf` to the new directory `output`.

    Raises `ConfigError` for a model or tokenizer that llama.cpp does not support, before weights are read.
    """
    require("gguf", "export")
    found = ckpt.inspect(builder.local_directory(model_path))
    if found.kind is Kind.LORA:
        raise ConfigError(f"{found.path} holds a LoRA adapter; merge it first with scripts/merge_lora_weights.py.")
    is_chat = found.kind is not Kind.LANGUAGE_MODEL
    base = builder.resolve_base(found, model_base, text_only=not is_chat)
    config = builder.model_config(found, None) if is_chat else builder.read_config(found)
    refuse(found, language_problem(found, config))
    language_parts(found, base, config)  # raises for weights that do not fit
    source, name = base or found, get_model_name_from_path(str(model_path))
    tokenizer = load_tokenizer(source.path)
    rows = ckpt.weight_shapes(source.path)[ckpt.EMBEDDINGS[0]][0]
    stop = None
    if is_chat:
        builder.extend_tokenizer(tokenizer, config, rows)
    if is_chat or conv_mode:
        config.conv_template = template_for(config, name, conv_mode)
        set_chat_template(tokenizer, config)
        [stop] = stop_strings(get_template(config.conv_template))
    ends = end_tokens(tokenizer, builder.read_generation_config(source.path), stop)
    tower = None
    if is_chat and not text_only:
        builder.preflight(found, config, from_checkpoint=True)
        tower = tower_part(config, builder.tower_directory(found, base), True)[1]
        refuse(found, tower_problem(tower))

    def fill_language_model(writer: GGUFWriter) -> None:
        writer.add_name(name)
        add_language_model(writer, config, rows)
        add_vocabulary(writer, tokenizer, rows, ends)

    with atomic_directory(output) as directory:
        files = [f"model-{outtype}.gguf"]
        weights = list(language_weights(source.path, config))
        write_file(directory / files[0], "llama", fill_language_model, weights, outtype)
        if tower is not None:
            files.append(f"mmproj-{outtype}.gguf")
            fill = partial(add_vision, config=config, tower=tower)
            weights = list(vision_weights(found, tower))
            write_file(directory / files[1], "clip", fill, weights, outtype)
    known = stop is None or tokenizer.convert_tokens_to_ids(stop) in ends
    return Exported([Path(output) / file for file in files], None if known else stop)
