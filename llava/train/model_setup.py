"""What a run needs before its first step: the base model, its tokenizer, the template and the vision modules."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.conversation import get_template
from llava.errors import CheckpointError, ConfigError, TrainingError
from llava.files import atomic_write
from llava.model import builder
from llava.model.builder import local_directory
from llava.model.checkpoint import NON_LORA_FILE, Checkpoint, Kind, has_weights, inspect, layer_index
from llava.model.llava_arch import grow_embeddings
from llava.model.lora import ADAPTER_FILES, ADAPTER_PREFIX, read_non_lora
from llava.model.quantization import Quantizer
from llava.model.registry import language_model_spec
from llava.model.tokenizer import load_tokenizer
from llava.model.zero import is_partitioned
from llava.placement import resolve_attention
from llava.train import weights, zero
from llava.train.weights import Named
from llava.train.zero import full_shape
from llava.utils import require

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
    return builder.language_model(found, None, config, dtype, args.device, quantizer.quantize_on_load)


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


# --- LoRA runs --------------------------------------------------------------------------------------------------------


OUTSIDE = ("mm_projector", "vision_tower", "vision_resampler", "lm_head")
NAME = "default"


def linear_names(model: nn.Module) -> list[str]:
    """Last name components of the decoder's linear layers, packed ones included; never tower, projector, head (T17)."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not any(part in name for part in OUTSIDE)
        }
    )


def wrap(model: Any, model_args: ModelArguments, args: TrainingArguments) -> Any:
    """The PEFT model around `model`, to be called before the tower is loaded: its layers may be named alike.

    PEFT is told of no bias (`lora_bias`): those that learn are saved beside the adapter, and the tower's never do (T4).
    """
    peft = require("peft", "train")
    settings = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=linear_names(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)  # packed layers too: PEFT's own class for them lags bitsandbytes
    settings.base_model_name_or_path = model_args.model_name_or_path
    snapshot = Path(model.config._name_or_path)
    if snapshot.parent.name == "snapshots":  # of the hub's cache: the folder is named by its commit
        settings.revision = snapshot.name
    logger.info("LoRA of rank %d on %s.", args.lora_r, ", ".join(sorted(settings.target_modules)))
    return adapted


def learns(name: str, bias: str) -> bool:
    """Whether a parameter of the wrapped language model learns under `--lora_bias`."""
    if any(part in name for part in OUTSIDE):
        return False
    of_target = name.endswith(".base_layer.bias")
    return ".lora_" in name or (bias == "lora_only" and of_target) or (bias == "all" and name.endswith("bias"))


def saved_parameters(model: Any) -> tuple[Named, Named]:
    """Adapter, and the rest that base and adapter lack, by their names in the files.

    The rest is what else learns, the projector in any case, and the embeddings when image tokens gave them new rows.
    """
    config = model.config
    beside = ["mm_projector", "vision_resampler"]
    if getattr(config, "mm_use_im_start_end", False) or getattr(config, "mm_use_im_patch_token", False):
        beside += ["embed_tokens", "wte", "lm_head"]
    adapter, rest = [], []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapter.append((name.replace(f".{NAME}.", "."), parameter))
        elif parameter.requires_grad or any(part in name for part in beside):
            rest.append((name.replace(".base_layer.", "."), parameter))
    return adapter, rest


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a directory of this run must hold."""
    adapter, rest = saved_parameters(model)
    return weights.shapes(adapter + rest)


def save(model: Any, tokenizer: Any, directory: Path, *, keep: bool) -> None:
    """Write all a loader needs beside the base, and verify it; collective under ZeRO-3, ranks with `keep` write."""
    adapter, rest = (zero.collect(named, keep=keep) for named in saved_parameters(model))
    if not keep:
        return
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = copy.copy(model.peft_config[NAME])
    settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
    settings.save_pretrained(str(directory))
    with atomic_write(directory / ADAPTER_FILES[0]) as part:
        save_file(adapter, part, metadata={"format": "pt"})
    weights.write_bin(directory / NON_LORA_FILE, rest)
    weights.verify(directory, shapes(model))


def load(model: Any, directory: Path) -> None:
    """Put what `save` wrote back into the model in training; every tensor must find its place, and every place one."""
    adapter, rest = saved_parameters(model)
    state: dict[str, torch.Tensor] = load_file(directory / ADAPTER_FILES[0])
    state |= {ADAPTER_PREFIX + name: value for name, value in read_non_lora(directory).items()}
    missing = sorted({name for name, _ in adapter + rest} - set(state))
    if missing:
        raise CheckpointError(f"{directory} lacks {missing[0]}, which learns with these flags; use those of its run.")
    weights.copy_named(dict(adapter + rest), state, str(directory))


# --- Which parameters learn -------------------------------------------------------------------------------------------


def set_trainable(model: Any, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """Set `requires_grad` by the table of §8.2; of the tower, what was asked for learns: positions, layers or all."""
    core = model.get_model()
    adapted = training_args.lora_enable
    model.requires_grad_(not (model_args.tune_mm_mlp_adapter or training_args.freeze_llm or adapted))
    if model_args.freeze_backbone:
        core.requires_grad_(False)
    if adapted:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns(name, training_args.lora_bias))
    if model_args.tune_mm_mlp_adapter and model_args.mm_use_im_start_end:
        model.get_input_embeddings().requires_grad_(True)
    tower = model.get_vision_tower()
    if tower is None:
        return
    core.mm_projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    tower.requires_grad_(False)
    if model_args.unfreeze_mm_vision_tower:
        unfreeze_tower(tower, model_args.unfreeze_mm_vision_layers)
    if model_args.tune_vit_pos_embedding:
        table = getattr(getattr(tower.vision_tower, "embeddings", None), "position_embedding", None)
        if not isinstance(table, torch.nn.Parameter):
            raise ConfigError(f"--tune_vit_pos_embedding needs an InternViT tower; {model_args.vision_tower} is none.")
        table.requires_grad_(True)


def unfreeze_tower(tower: Any, last: int) -> None:
    """Let the tower learn: all of it, or the `last` layers of those whose features are used."""
    if not last:
        tower.vision_tower.requires_grad_(True)
        return
    if tower.spec.layers is None or last > tower.depth:
        raise ConfigError(f"--unfreeze_mm_vision_layers {last}: {tower.name} has {tower.depth} layers that are used.")
    for name, parameter in tower.vision_tower.named_parameters():
        index = layer_index(name, tower.spec.layers)
        parameter.requires_grad_(index is not None and index >= tower.depth - last)


def set_precision(model: torch.nn.Module, compute_dtype: torch.dtype, *, engine: bool, packed: bool = False) -> None:
    """float32 masters for what learns, `compute_dtype` for what is frozen; under DeepSpeed all in `compute_dtype`.

    DeepSpeed keeps its own float32 masters; elsewhere autocast makes the 16-bit products. In a language model with
    `packed` weights the norms are float32 as well; those of the tower are not (T19).
    """
    for name, parameter in model.named_parameters():
        if not is_partitioned(parameter) and parameter.is_floating_point():
            norm = packed and "norm" in name and not any(part in name for part in OUTSIDE)
            master = (parameter.requires_grad or norm) and not engine
            parameter.data = parameter.data.to(torch.float32 if master else compute_dtype)


def as_saved(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """After training: everything in the dtype the published checkpoints have, half the size of the masters."""
    for parameter in model.parameters():
        if not is_partitioned(parameter) and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype)


def count(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers in trainable parameters, and in all; `TrainingError` if nothing would learn."""
    sizes = [(parameter.requires_grad, torch.Size(full_shape(parameter)).numel()) for parameter in model.parameters()]
    trainable = sum(size for learns, size in sizes if learns)
    if not trainable:
        raise TrainingError("These flags freeze every parameter, so nothing would be trained; drop a --freeze_* flag.")
    return trainable, sum(size for _, size in sizes)
