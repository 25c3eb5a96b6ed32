"""What a run needs before its first step: the base model, its tokenizer, the template and the vision modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from llava.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.conversation import get_template
from llava.errors import CheckpointError, ConfigError
from llava.model import builder
from llava.model.builder import local_directory
from llava.model.checkpoint import Checkpoint, Kind, has_weights, inspect
from llava.model.language_model.builder import language_model_spec
from llava.model.llava_arch import grow_embeddings
from llava.model.quantization import Quantizer
from llava.model.tokenizer import load_tokenizer
from llava.placement import resolve_attention

logger = logging.getLogger(__name__)
# what a chat model has learned to see with
SEES = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio")
VICUNA_V0 = {"v0": "v0", "v0.5": "v0"}


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32


def load_base(model_args: ModelArguments, args: TrainingArguments) -> Any:
    """The language model (or chat checkpoint) to train, weights checked, on the CPU or, under ZeRO-3, partitioned.

    Raises `CheckpointError` for anything that is neither, before weights are read.
    """
    found = inspect(local_directory(model_args.model_name_or_path))
    if found.kind not in (Kind.LANGUAGE_MODEL, Kind.FULL) or not has_weights(found.path):
        raise CheckpointError(
            f"--model_name_or_path {found.path} holds {found.kind.value}; training starts from a LLaMA or MPT "
            "language model such as lmsys/vicuna-7b-v1.5, or goes on from a full chat checkpoint."
        )
    config = builder.read_config(found)
    if model_args.vision_tower is None and getattr(config, "mm_vision_tower", None):
        raise ConfigError(f"{found.path} is a chat checkpoint; give its --vision_tower to train it further.")
    dtype = compute_dtype(args)
    masters = not (args.deepspeed or model_args.tune_mm_mlp_adapter or args.freeze_llm or args.lora_enable)
    spec = language_model_spec(found.model_type, str(found.path))
    attention = resolve_attention(args.device, dtype, model_args.attn_implementation, spec.attention)
    logger.info("Attention of the language model: %s.", attention)
    config._attn_implementation = attention  # the keyword of from_pretrained drops "eager" when a config is given
    if args.bits != 16:
        return _packed_base(found, config, args, attention)
    loaded: tuple[Any, dict[str, Any]] = spec.model.from_pretrained(
        found.path,
        config=config,
        torch_dtype=torch.float32 if masters else dtype,
        output_loading_info=True,
    )
    model, loading = loaded
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if wrong:
        raise CheckpointError(f"The weights of {found.path} do not fit its config.json: {', '.join(wrong[:4])}.")
    model.config.use_cache = False
    return model


def _packed_base(found: Checkpoint, config: Any, args: TrainingArguments, attention: str) -> Any:
    """The base with its decoder in 8 or 4 bits, packed as it is read (spec/train.md §9.2)."""
    dtype = compute_dtype(args)
    quantizer = Quantizer(args.bits, dtype, args.device, args.quant_type, args.double_quant)
    config.name_or_path, config.torch_dtype, config.use_cache = str(found.path), dtype, False
    config._attn_implementation = attention
    return builder.language_model(found, None, config, dtype, args.device, quantizer.place)


def load_training_tokenizer(model_args: ModelArguments, args: TrainingArguments) -> Any:
    """The base's tokenizer, padding on the right, cut at `--model_max_length`."""
    directory = local_directory(model_args.model_name_or_path)
    return load_tokenizer(Path(directory), model_max_length=args.model_max_length, padding_side="right")


def template_name(version: str) -> str:
    """`--version` to a registered template (spec/train.md §8.1); an unknown one is a `TemplateError` (T9)."""
    name = VICUNA_V0.get(version, version)
    get_template(name)
    return name


def set_pad_token(model: Any, tokenizer: Any, version: str, *, may_grow: bool = True) -> None:
    """Pad = `[PAD]` (new, embedded as the mean) for v0, else the unknown token (spec/train.md §8.1).

    A tokenizer without an unknown token keeps its own pad token, or pads with its end token; masks come from lengths.
    """
    if version == "v0":
        if tokenizer.pad_token is None and not may_grow:
            raise ConfigError("--version v0 adds [PAD] to this base, which an adapter cannot carry; use v0.5 or v1.")
        if tokenizer.pad_token is None:
            added = tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            grow_embeddings(model, len(tokenizer), new_rows=added)
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def add_vision(model: Any, model_args: ModelArguments, data_args: DataArguments, dtype: torch.dtype) -> Any:
    """Load the tower (in `dtype`) and the projector; write what data and checkpoints need into config and arguments."""
    if model_args.mm_vision_image_size:
        model.config.mm_vision_image_size = model_args.mm_vision_image_size
    core = model.get_model()
    projector, trained = getattr(core, "mm_projector", None), {key: getattr(model.config, key, None) for key in SEES}
    core.initialize_vision_modules(model_args=model_args, dtype=dtype)
    if projector is not None:  # of a chat model
        _compare(trained, model_args, data_args, kept=core.mm_projector is projector)
    data_args.image_processor = model.get_vision_tower().image_processor  # type: ignore[attr-defined]
    data_args.is_multimodal = True
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end  # type: ignore[attr-defined]
    config = model.config
    config.image_aspect_ratio = data_args.image_aspect_ratio
    config.image_grid_pinpoints = data_args.image_grid_pinpoints
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.tune_vit_pos_embedding = model_args.tune_vit_pos_embedding
    return model.get_vision_tower()


def _compare(trained: dict[str, Any], model_args: ModelArguments, data_args: DataArguments, *, kept: bool) -> None:
    """Refuse to replace a chat model's projector by one that has learned nothing; say what else it sees otherwise."""
    if not kept and not (model_args.pretrain_mm_mlp_adapter or model_args.tune_mm_mlp_adapter):
        raise ConfigError(
            f"The projector of {model_args.model_name_or_path} ({trained['mm_projector_type']}) does not fit "
            f"--mm_projector_type {model_args.mm_projector_type} and this tower, and a new one has learned nothing; "
            "give its type and tower, a projector with --pretrain_mm_mlp_adapter, or --tune_mm_mlp_adapter True."
        )
    for key, value in {**vars(model_args), **vars(data_args)}.items():
        if kept and trained.get(key) not in (None, value):
            logger.info("The chat model was trained with --%s %s; this run has %s.", key, trained[key], value)
