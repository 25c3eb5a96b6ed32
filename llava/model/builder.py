"""Loading of chat models: `load_pretrained_model`.

The files of a directory determine its kind (`checkpoint.inspect`). Weights are read once, into their final place, and
verified. Tower weights in the checkpoint take precedence over the tower's own.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, cast

import torch
from torch import nn
from transformers import CLIPImageProcessor, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import CheckpointError, ConfigError
from llava.model import checkpoint as ckpt
from llava.model.checkpoint import Checkpoint, Kind
from llava.model.config import context_length, read_settings
from llava.model.dispatch import DeviceMap, dispatch, infer_device_map
from llava.model.hub import snapshot
from llava.model.language_model.causal_lm import LlavaForCausalLMMixin
from llava.model.llava_arch import grow_embeddings, load_token_rows, parameter_shapes
from llava.model.lora import (
    adapter_shapes,
    adapts_tower,
    apply_adapter,
    check_adapter,
    check_non_lora,
    check_vocabulary,
    load_non_lora,
    read_non_lora,
)
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.quantization import Quantizer, storage_name
from llava.model.registry import language_model_spec
from llava.model.tokenizer import load_tokenizer
from llava.model.weights import WeightLoader, empty_weights, load_weights
from llava.placement import Placement, avoid_cudnn_attention, resolve_attention, resolve_device, resolve_dtype

logger = logging.getLogger(__name__)
REQUIRED_SETTINGS = ("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MAX_DELTA_NORM = 0.1  # largest weight of a delta's final norm; those of a model are near 1
IGNORED_WEIGHTS = ("rotary_emb.inv_freq", *ckpt.TOWER_PREFIXES)

REMEDIES: Final = {
    Kind.LANGUAGE_MODEL: "it does not take images; pass a chat checkpoint, and this one as --model-base of a "
    "projector, or --text-only",
    Kind.TOWER: "pass a chat checkpoint, and a tower with --vision-tower",
    Kind.HF_LLAVA: "load it with transformers' LlavaForConditionalGeneration, or use liuhaotian/llava-v1.5-7b",
    Kind.INTERNVL_CHAT: "load it with the InternVL repository, or use OpenGVLab/InternVL-Chat-ViT-6B-*",
    Kind.OTHER: "pass a directory whose config.json has mm_vision_tower and a llava_llama, llava or llama model_type",
    Kind.EMPTY: "a chat checkpoint has config.json and model.safetensors, pytorch_model.bin or mm_projector.bin",
}


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: DeviceMap = "auto",
    device: str | torch.device | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    vision_tower: str | None = None,
    attn_implementation: str = "auto",
    num_gpus: int | None = None,
    max_memory: str | None = None,
    text_only: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[PreTrainedTokenizerBase, LlavaForCausalLMMixin, CLIPImageProcessor | None, int]:
    """Load `(tokenizer, model, image_processor, context_len)`, the model in eval mode with its tower.

    Args:
        model_path: a full, a projector-only or a LoRA checkpoint: a directory or a hub name.
        model_base: the language model of a projector or adapter; an adapter's default is the one it names.
        model_name: accepted for compatibility and ignored.
        load_8bit, load_4bit: quantize the linear layers of the decoder.
        device_map: "auto" for `device`, or for several GPUs if `device` is "cuda" and one cannot hold the weights, or
            `num_gpus` or `max_memory` is given; the name of a device; or a mapping of module names to devices.
        device: the device of "auto"; default CUDA if a GPU is visible, else MPS, else the CPU.
        dtype: of language model, projector and tower; default float32 on CPUs, 16 bit on GPUs.
        vision_tower: replaces the tower that the checkpoint names.
        num_gpus: the largest number of GPUs.
        max_memory: of each GPU, as "20GiB" or "0=10GiB,1=20GiB".
        text_only: load a language model without a tower, or a LoRA adapter on one; the image processor is `None`.
        progress: called with the fraction of the weights loaded so far.

    Raises:
        CheckpointError: the directory does not hold a chat model; raised before weights are read.
    """
    if load_8bit and load_4bit:
        raise ConfigError("--load-8bit and --load-4bit are mutually exclusive; give one of them.")
    if isinstance(device_map, str) and device_map != "auto":
        device = device_map
    target = resolve_device(device)
    avoid_cudnn_attention(target)
    found = ckpt.inspect(local_directory(model_path))
    base = resolve_base(found, model_base, text_only)
    config = read_config(base or found) if text_only else model_config(found, vision_tower)
    chosen = resolve_dtype(target, dtype, found.dtype)
    kernels = language_model_spec((base or found).model_type, str(found.path)).attention
    config._attn_implementation = resolve_attention(target, chosen, attn_implementation, kernels)
    tokenizer = load_tokenizer(base.path if base else found.path)
    if not text_only:
        preflight(found, config, vision_tower is None)
    bits = 8 if load_8bit else 4 if load_4bit else 0
    quantizer = Quantizer(bits, chosen, target) if bits else None
    shapes = partial(all_shapes, (base or found).path, config, vision_tower is None)
    where = infer_device_map(
        target,
        device_map,
        shapes=shapes,
        storage=storage_name(chosen, bits),
        tied=bool(config.tie_word_embeddings),
        num_gpus=num_gpus,
        max_memory=max_memory,
    )
    parts = (base, None) if text_only and base else (found, base)
    weight_loader, quantize = None, None
    if quantizer is not None and found.kind is Kind.LORA:
        weight_loader, quantize = quantizer.defer, partial(quantizer.merge_and_quantize, where=where.of)
    elif quantizer is not None:
        weight_loader = quantizer.quantize_on_load
    with ckpt.progress_of(shapes, progress):
        model = language_model(*parts, config, chosen, where, weight_loader)
        if not text_only:
            add_image_tokens(model, tokenizer, config)
        tower = model.get_vision_tower()
        if tower is not None:
            tower_device = where.of(f"{model.base_model_prefix}.vision_tower")
            load_tower(tower, found, base, chosen, tower_device, from_checkpoint=vision_tower is None)
        model = load_adapter_weights(model, found, quantize)
    if tower is not None and found.kind is not Kind.FULL and ckpt.has_tensors(found.path / ckpt.PROJECTOR_FILE):
        model.get_model().load_tuned_positions(found.path / ckpt.PROJECTOR_FILE)
    dispatch(model.eval(), where)
    return tokenizer, model, tower.image_processor if tower else None, context_length(config)


def preflight(found: Checkpoint, config: PretrainedConfig, from_checkpoint: bool) -> None:
    """Check before weights are read that the tower exists and fits the projector."""
    tower = build_vision_tower(config, found.path, delay_load=True)
    tower.source(from_checkpoint)
    _ = tower.image_processor
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if tower.hidden_size != config.mm_hidden_size or bool(tower.spec.queries(tower.config)) != (kind == "two_mlp"):
        raise CheckpointError(
            f"The vision tower {tower.name!r} ({tower.settings.get('model_type')}) has features of width "
            f"{tower.hidden_size}, but the {kind} projector of {found.path} takes {config.mm_hidden_size}; pass the "
            "tower it was trained with."
        )


def tower_directory(found: Checkpoint, base: Checkpoint | None) -> Path:
    """The checkpoint whose weights of the tower take precedence, as in training: the base, if it has that tower's."""
    if base is None or base.config.get("mm_vision_tower") != found.config.get("mm_vision_tower"):
        return found.path
    stored = any(name.startswith(ckpt.TOWER_PREFIXES) for name in ckpt.weight_shapes(base.path))
    return base.path if stored else found.path


def load_tower(
    tower: VisionTower, found: Checkpoint, base: Checkpoint | None, dtype: torch.dtype, device: torch.device,
    *, from_checkpoint: bool = True,
) -> None:  # fmt: skip
    """Load the weights of the tower of a checkpoint, see `VisionTower.load_model`."""
    _ = tower.image_processor  # of the tower's directory, which may lie beside `found`
    tower.checkpoint_dir = tower_directory(found, base)
    tower.load_model(dtype=dtype, device=device, from_checkpoint=from_checkpoint)


def refuse_delta(source: Path) -> None:
    """Raise `CheckpointError` for delta weights; they are recognized before other weights are read, if possible."""
    if not ckpt.reads_lazily(source):
        return
    for _, norm in ckpt.iter_tensors(source, lambda name: name in ckpt.FINAL_NORMS):
        if bool(norm.abs().max() < MAX_DELTA_NORM):
            raise CheckpointError(
                f"The weights of {source} are delta weights (the final norm is nearly 0); apply them to their base "
                "with python -m llava.model.apply_delta."
            )


def load_adapter_weights(
    model: LlavaForCausalLMMixin, found: Checkpoint, quantize: Callable[[nn.Module], None] | None
) -> LlavaForCausalLMMixin:
    """Load the weights of a projector-only or LoRA checkpoint into the model of its base.

    `quantize` merges an adapter into each layer and quantizes it.
    """
    if found.kind is Kind.PROJECTOR:
        model.get_model().load_projector(found.path / ckpt.PROJECTOR_FILE)
        if getattr(model.config, "mm_use_im_start_end", False):
            load_token_rows(model, found.path / ckpt.PROJECTOR_FILE)
    elif found.kind is Kind.LORA:
        if model.get_vision_tower() is not None:
            load_non_lora(model, found.path)
        model = apply_adapter(model, found.path, quantize)
    return model


def check_adapter_weights(
    found: Checkpoint, base: Checkpoint | None, config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]
) -> Path:
    """Verify a projector or an adapter against a model of these `shapes`; returns the file with the projector."""
    if found.kind is Kind.PROJECTOR:
        file = ckpt.tensor_file(found.path / ckpt.PROJECTOR_FILE)
        state = ckpt.projector_state(ckpt.read_tensors(file), file)
        wanted = {k.split("mm_projector.", 1)[1]: v for k, v in shapes.items() if "mm_projector." in k}
        ckpt.compare_shapes({name: tuple(value.shape) for name, value in state.items()}, wanted, file)
        return file
    if found.kind is Kind.LORA and base is not None:
        embedding = next(name for name in ckpt.EMBEDDINGS if name in shapes)
        rows = shapes[embedding][0]
        rows = max(rows, extend_tokenizer(load_tokenizer(base.path), config, rows))
        check_vocabulary(found.path, rows)
        table = (rows, config.hidden_size)
        shapes = {**shapes, embedding: table, "lm_head.weight": table}
        check_non_lora(read_non_lora(found.path), shapes, found.path)
        adapter = adapter_shapes(found.path)
        if adapts_tower(adapter):
            vision = build_vision_tower(config, tower_directory(found, base), delay_load=True)
            tower = vision.stored_shapes(from_checkpoint=True)
            core = embedding.partition(".")[0]
            shapes |= {f"{core}.vision_tower.vision_tower.{name}": shape for name, shape in tower.items()}
        check_adapter(adapter, shapes, found.path)
        return ckpt.tensor_file(found.path / ckpt.NON_LORA_FILE)
    return found.path


def all_shapes(source: Path, config: PretrainedConfig, from_checkpoint: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the loaded model's weights, with tower and projector, from file headers."""
    separate = (*ckpt.TOWER_PREFIXES, *ckpt.PROJECTOR_PREFIXES)
    stored = {name: s for name, s in ckpt.weight_shapes(source).items() if not name.startswith(separate)}
    if not getattr(config, "mm_vision_tower", None):
        return stored
    tower = build_vision_tower(config, Path(config.name_or_path), delay_load=True)
    with empty_weights():
        projector = parameter_shapes(build_vision_projector(config))
    parts = {"vision_tower.": tower.stored_shapes(from_checkpoint), "mm_projector.": projector}
    return {**stored, **{f"{part}{name}": s for part, shapes in parts.items() for name, s in shapes.items()}}


def local_directory(path: str | Path) -> Path:
    """`path` if it is a directory, else the hub snapshot of that name, from the cache or downloaded unless offline."""
    if os.path.isdir(path):  # noqa: PTH112 (as in checkpoint.require_directory)
        return Path(path)
    name = str(path)
    found: Path | None = None
    asked: list[str] = []
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        found, asked = snapshot(name)
    if found is None:
        raise CheckpointError(
            f"There is no directory {name!r}{', and it is not in ' + ' or '.join(asked) if asked else ''}; "
            "check the path, or download the checkpoint first."
        )
    return found


def resolve_base(found: Checkpoint, model_base: str | Path | None, text_only: bool = False) -> Checkpoint | None:
    """The verified base of an adapter or projector; raises `CheckpointError` for a directory that cannot be loaded."""
    if text_only and (found.kind not in (Kind.LANGUAGE_MODEL, Kind.LORA) or "mm_vision_tower" in found.config):
        raise CheckpointError(
            f"text_only=True (--text-only) loads a language model or its adapter, but {found.path} holds "
            f"{found.kind.value}; remove it."
        )
    if found.kind in REMEDIES and not text_only:
        raise CheckpointError(
            f"{found.path} holds {found.kind.value}"
            f"{f' (model_type {found.model_type!r})' if found.model_type else ''}, not a chat checkpoint: "
            f"{REMEDIES[found.kind]}."
        )
    if found.kind in (Kind.FULL, Kind.LANGUAGE_MODEL):
        if model_base is not None:
            logger.warning("%s holds %s; --model-base %s is ignored", found.path, found.kind.value, model_base)
        return None
    base = ckpt.inspect(local_directory(model_base) if model_base else _named_base(found))
    if base.kind not in (Kind.LANGUAGE_MODEL, Kind.FULL) or not ckpt.has_weights(base.path):
        raise CheckpointError(
            f"The --model-base {base.path} holds {base.kind.value}; pass a LLaMA or Vicuna directory."
        )
    if not found.config and not text_only:
        raise CheckpointError(
            f"{found.path} has no config.json, which names tower and projector; copy it from the same training run, or "
            "load an adapter of a language model with --text-only."
        )
    if found.config:
        _compare_base(found, base)
    return base


def _named_base(found: Checkpoint) -> Path:
    """The directory of the base that an adapter names, which may be a path of the training host."""
    settings = ckpt.read_json(found.path / ckpt.ADAPTER_CONFIG) if found.kind is Kind.LORA else {}
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{found.path} holds {found.kind.value}, which needs a language model; pass --model-base, for example "
            "--model-base lmsys/vicuna-7b-v1.5."
        )
    try:
        return local_directory(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"The base {name!r} of {found.path} does not exist here; pass the directory of that language model with "
            "--model-base."
        ) from error


def _compare_base(found: Checkpoint, base: Checkpoint) -> None:
    specs = [language_model_spec(part.model_type, str(part.path)) for part in (found, base)]
    if specs[0] != specs[1]:
        raise CheckpointError(
            f"{found.path} is of type {found.model_type!r}, but --model-base {base.path} is of type "
            f"{base.model_type!r}; pass the base it was trained on."
        )
    trained, given = read_config(found), read_config(base)
    for key in SIZES:
        ours, theirs = getattr(trained, key, None), getattr(given, key, None)
        if ours != theirs:
            raise CheckpointError(
                f"{found.path} was trained on a language model with {key}={ours}, but --model-base {base.path} has "
                f"{key}={theirs}; pass the base it was trained on."
            )


def read_config(found: Checkpoint) -> PretrainedConfig:
    """The parsed `config.json`, of the class registered for its `model_type`; for weights as they are loaded here.

    Raises `CheckpointError` for unsupported settings, among them weights that are stored quantized.
    """
    spec = language_model_spec(found.model_type, str(found.path))
    with ckpt.config_errors(found.path):
        settings = {key: value for key, value in found.config.items() if key != "model_type"}
        config: PretrainedConfig = spec.config.from_dict(read_settings(settings, spec.config, found.path))
    if getattr(config, "quantization_config", None) is not None:
        if found.kind in (Kind.FULL, Kind.LANGUAGE_MODEL):
            raise CheckpointError(_quantized(found.path, config.quantization_config))
        del config.quantization_config  # of the base of a QLoRA run, which is quantized while it is loaded
    return config


def _quantized(path: Path, settings: object) -> str:
    """The message for a checkpoint with a `quantization_config`."""
    given = settings if isinstance(settings, dict) else {}
    method = given.get("quant_method") or ("bitsandbytes" if given.keys() & {"load_in_4bit", "load_in_8bit"} else None)
    return (
        f"{path} holds quantized weights ({method or settings!r} in quantization_config of its config.json); pass the "
        "checkpoint they were made from, and quantize it while loading with --load-4bit or --load-8bit, in training "
        "with --bits. If the weights are in 16 or 32 bits, delete quantization_config."
    )


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """The parsed `generation_config.json`, if there is one; null, which newer libraries write, is the default."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    settings = {key: value for key, value in ckpt.read_json(file).items() if value is not None}
    with ckpt.config_errors(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sampling settings without do_sample, as in published Vicunas
        config = GenerationConfig(**settings)
        config._original_object_hash = hash(config)  # as `from_pretrained` does; `generate` reads it
        return config


def empty_model(found: Checkpoint, base: Checkpoint | None, config: PretrainedConfig) -> LlavaForCausalLMMixin:
    """The model on the meta device; with a base, of the base's vocabulary, which new tokens are appended to."""
    config = copy.copy(config)
    if base is not None:
        config.vocab_size = read_config(base).vocab_size
        if type(config.pad_token_id) is int and config.pad_token_id >= config.vocab_size:
            config.pad_token_id = None  # a token that the training added
    spec = language_model_spec((base or found).model_type, str(found.path))
    source = (base or found).path
    refuse_delta(source)
    ckpt.check_depth(getattr(config, "num_hidden_layers", None), source)
    with ckpt.config_errors(found.path), empty_weights():
        model: LlavaForCausalLMMixin = spec.model(config)
    if (generation := read_generation_config(source)) is not None:
        model.generation_config = generation
    return model


def model_config(found: Checkpoint, vision_tower: str | None) -> PretrainedConfig:
    """The configuration of a chat model, with the settings that tower and projector require."""
    config = read_config(found)
    config.name_or_path = str(found.path)
    with ckpt.config_errors(found.path):
        context_length(config)
    missing = [key for key in REQUIRED_SETTINGS if getattr(config, key, None) is None]
    if missing:
        raise CheckpointError(
            f"{found.path}/config.json has no {' and '.join(missing)}; copy it from the same training run."
        )
    if not isinstance(getattr(config, "conv_template", None), str | None):
        raise CheckpointError(
            f"conv_template in {found.path}/config.json must be a string, got {config.conv_template!r}."
        )
    if vision_tower is not None:
        config.mm_vision_tower, config.mm_vision_tower_config = vision_tower, None
    return config


def language_model(
    found: Checkpoint,
    base: Checkpoint | None,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device | Placement,
    weight_loader: WeightLoader | None,
) -> LlavaForCausalLMMixin:
    """The model with its weights; with a base, the projector is zero until `load_adapter_weights`."""
    where = device if isinstance(device, Placement) else Placement({"": device})
    source = base.path if base else found.path
    model = empty_model(found, base, config)
    check_adapter_weights(found, base, config, parameter_shapes(model))
    tensors = ckpt.iter_tensors(source, lambda name: not name.startswith(ckpt.TOWER_PREFIXES))
    load_weights(
        model,
        tensors,
        dtype=dtype,
        device=where.of,
        source=str(source),
        optional=ckpt.PROJECTOR_PREFIXES if base else (),
        ignored=IGNORED_WEIGHTS,
        weight_loader=weight_loader,
    )
    _refresh_rotary(model, dtype, where)
    return model


def _refresh_rotary(model: nn.Module, dtype: torch.dtype, where: Placement) -> None:
    """Recompute the rotary tables, created in the default dtype on the CPU, in the model's dtype and on its devices."""
    for name, module in model.named_modules():
        if hasattr(module, "max_seq_len_cached"):
            rotary = cast("LlamaRotaryEmbedding", module)
            rotary._set_cos_sin_cache(seq_len=rotary.max_seq_len_cached, device=where.of(name), dtype=dtype)


def add_image_tokens(
    model: LlavaForCausalLMMixin, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """Add the image tokens of the configuration, and grow the embeddings to hold them.

    New rows are the mean of the others, so that loading is deterministic.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    entries = extend_tokenizer(tokenizer, config, rows)
    if entries > rows:
        grow_embeddings(model, entries, new_rows=entries - rows)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rows: int) -> int:
    """Add the image tokens of the configuration of a model with `rows` embeddings; returns the tokenizer's length."""
    patch = getattr(config, "mm_use_im_patch_token", None)
    if patch or (patch is None and rows > len(tokenizer)):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return len(tokenizer)
