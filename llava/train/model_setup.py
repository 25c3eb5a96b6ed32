"""Model setup for training: which parameters are trained, in which dtype, and which of them are saved.

`train.prepare` calls the functions in file order: load the base model, wrap it with LoRA, set the tokenizer and the pad
token, add the vision modules, apply the freeze policy, set the dtypes. `saved_parameters` decides what a checkpoint
holds; `llava.train.checkpointing` writes it. `FREEZE_POLICIES` and `LOSSES` are the registries of `--freeze_policy` and
`--loss`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import no_init_weights

from llava.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.conversation import conv_templates, get_template
from llava.errors import CheckpointError, ConfigError, TrainingError
from llava.model import builder
from llava.model.builder import IGNORED_WEIGHTS, local_directory
from llava.model.check import language_parts
from llava.model.checkpoint import Checkpoint, Kind, has_weights, inspect, iter_tensors, layer_index
from llava.model.language_model.loss import CrossEntropy, TokenLoss
from llava.model.llava_arch import copy_into, grow_embeddings
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.quantization import Quantizer
from llava.model.registry import language_model_spec
from llava.model.tokenizer import load_tokenizer
from llava.model.zero import is_partitioned
from llava.placement import resolve_attention
from llava.train.zero import full_shape
from llava.utils import require

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)
T = TypeVar("T")
NamedParameters = list[tuple[str, nn.Parameter]]
SaveFormat = Literal["full", "projector", "lora"]
FreezePolicy = Callable[[PreTrainedModel, ModelArguments, TrainingArguments], None]

VISION_KEYS: Final = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio")
NOT_DECODER: Final = ("mm_projector", "vision_tower", "vision_resampler", "lm_head")
ADAPTER: Final = "default"  # PEFT's name of the only adapter
TOWER_PATTERN: Final = "vision_tower.*"  # of the tower's modules, in `rank_pattern` and `alpha_pattern`
POSITION_EMBEDDING: Final = "vision_tower.embeddings.position_embedding"


# --- Base model, tokenizer and vision modules -------------------------------------------------------------------------


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of the matrix products: float16 for `--fp16`, bfloat16 for `--bf16`, else float32."""
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32


def load_base(model_args: ModelArguments, args: TrainingArguments) -> PreTrainedModel:
    """Load the language model or chat checkpoint to train, on the CPU or, under ZeRO-3, partitioned.

    Raises `CheckpointError` for any other kind of directory (before weights are read) and for weights that do not fit
    the configuration.
    """
    found = inspect(local_directory(model_args.model_name_or_path))
    if found.kind not in (Kind.LANGUAGE_MODEL, Kind.FULL) or not has_weights(found.path):
        raise CheckpointError(
            f"--model_name_or_path must be a LLaMA or MPT language model (such as lmsys/vicuna-7b-v1.5) or a full chat "
            f"checkpoint; {found.path} holds {found.kind.value}."
        )
    if model_args.vision_tower is None and found.kind is Kind.FULL:
        raise ConfigError(f"{found.path} is a chat checkpoint; pass its --vision_tower.")
    config = builder.model_config(found, None) if found.kind is Kind.FULL else builder.read_config(found)
    language_parts(found, None, config)  # raises what `llava check` says
    dtype = compute_dtype(args)
    spec = language_model_spec(found.model_type, str(found.path))
    attention = resolve_attention(args.device, dtype, model_args.attn_implementation, spec.attention)
    logger.info("Attention implementation of the language model: %s.", attention)
    config._attn_implementation = attention
    if args.bits != 16:
        return _load_quantized_base(found, config, args)
    frozen = model_args.tune_mm_mlp_adapter or args.freeze_llm or args.lora_enable
    config.name_or_path = str(found.path)
    stored = dtype if args.deepspeed or frozen else torch.float32
    with no_init_weights():
        model: PreTrainedModel = spec.model._from_config(config, torch_dtype=stored, attn_implementation=attention)
    model.tie_weights()
    for name, tensor in iter_tensors(found.path, lambda name: not any(part in name for part in IGNORED_WEIGHTS)):
        copy_into(model, {name: tensor})
    if (generation := builder.read_generation_config(found.path)) is not None:
        model.generation_config = generation
    model.config.use_cache = False
    return model.eval()


def _load_quantized_base(found: Checkpoint, config: PretrainedConfig, args: TrainingArguments) -> PreTrainedModel:
    """Load the base with its decoder quantized to `--bits`, weight by weight as the file is read."""
    dtype = compute_dtype(args)
    quantizer = Quantizer(args.bits, dtype, args.device, args.quant_type, args.double_quant)
    config.name_or_path, config.torch_dtype, config.use_cache = str(found.path), dtype, False
    return builder.language_model(found, None, config, dtype, args.device, quantizer.quantize_on_load)


def template_name(version: str) -> str:
    """Resolve `--version` to the name of a registered template; raises `TemplateError` for an unknown one."""
    name = "v0" if version == "v0.5" else version  # the same template; they differ in the pad token
    get_template(name)
    return name


def choose_template(model_args: ModelArguments) -> str:
    """The template of `--version`; without the flag, that of the chat checkpoint to continue, if it names one.

    Sets `model_args.version`. Logs the choice wherever the two differ or one is missing.
    """
    name = template_name(model_args.version)
    found = inspect(local_directory(model_args.model_name_or_path))
    if found.kind is not Kind.FULL:
        return name
    stored = found.config.get("conv_template")
    if not isinstance(stored, str) or stored not in conv_templates:
        if not model_args.version_given:
            logger.info("%s names no known template; using --version %s, the default.", found.path, name)
        return name
    if get_template(stored) == get_template(name):
        return name
    if model_args.version_given:
        logger.info("%s was trained with template %s; using --version %s.", found.path, stored, name)
        return name
    logger.info("Using template %s, with which %s was trained; pass --version to change it.", stored, found.path)
    model_args.version = stored
    return template_name(stored)


def setup_tokenizer(
    model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base model with right padding and set its pad token.

    `--version v0` adds `[PAD]`, embedded as the mean of all rows; otherwise the unknown token pads, else the pad token
    that is there, else the EOS token. Attention masks come from sequence lengths, so any id will do.
    """
    directory = Path(local_directory(model_args.model_name_or_path))
    tokenizer = load_tokenizer(directory, model_max_length=args.model_max_length, padding_side="right")
    if model_args.version == "v0":
        if tokenizer.pad_token is None:
            if args.lora_enable:
                raise ConfigError(
                    "--version v0 adds [PAD] to this tokenizer, which a LoRA adapter cannot hold; use v0.5 or v1."
                )
            added = tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            grow_embeddings(model, len(tokenizer), new_rows=added)
    else:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def add_vision(
    model: PreTrainedModel, model_args: ModelArguments, data_args: DataArguments, dtype: torch.dtype
) -> None:
    """Load the vision tower in `dtype`, create or keep the projector, and record both in the config.

    Sets `image_processor`, `is_multimodal` and `mm_use_im_start_end` of `data_args`, which the data set reads.
    """
    config, core = model.config, model.get_model()
    if model_args.mm_vision_image_size:
        config.mm_vision_image_size = model_args.mm_vision_image_size
    projector = getattr(core, "mm_projector", None)
    trained_with = {key: getattr(config, key, None) for key in VISION_KEYS}
    core.initialize_vision_modules(model_args=model_args, dtype=dtype)
    if projector is None and not (model_args.pretrain_mm_mlp_adapter or model_args.tune_mm_mlp_adapter):
        logger.info(
            "The projector starts untrained, because %s has none; stage 2 usually starts from that of stage 1 "
            "(--pretrain_mm_mlp_adapter mm_projector.bin).",
            model_args.model_name_or_path,
        )
    if projector is not None:  # of a chat checkpoint
        _check_vision_settings(trained_with, model_args, data_args, kept=core.mm_projector is projector)
    vars(data_args).update(
        image_processor=model.get_vision_tower().image_processor,
        is_multimodal=True,
        mm_use_im_start_end=model_args.mm_use_im_start_end,
    )
    config.image_aspect_ratio = data_args.image_aspect_ratio
    config.image_grid_pinpoints = data_args.image_grid_pinpoints
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.tune_vit_pos_embedding = model_args.tune_vit_pos_embedding


def _check_vision_settings(
    trained_with: Mapping[str, object], model_args: ModelArguments, data_args: DataArguments, *, kept: bool
) -> None:
    """Refuse to replace a trained projector with a random one; log vision settings that differ from the checkpoint."""
    if not kept and not (model_args.pretrain_mm_mlp_adapter or model_args.tune_mm_mlp_adapter):
        raise ConfigError(
            f"The projector of {model_args.model_name_or_path} ({trained_with['mm_projector_type']}) does not fit "
            f"--mm_projector_type {model_args.mm_projector_type} and this vision tower, and a new one would be "
            "untrained; pass the checkpoint's type and tower, --pretrain_mm_mlp_adapter, or --tune_mm_mlp_adapter True."
        )
    for key, value in {**vars(model_args), **vars(data_args)}.items():
        if kept and trained_with.get(key) not in (None, value):
            logger.info("The chat model was trained with --%s %s; this run has %s.", key, trained_with[key], value)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def target_modules(model: nn.Module) -> list[str]:
    """LoRA's target modules in the decoder, see `shortest_names`."""
    return shortest_names(model, decoder_layers(model))


def decoder_layers(model: nn.Module) -> set[str]:
    """Names of the decoder's linear layers, also quantized ones; not of projector, vision tower and `lm_head`."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name in linear if not any(part in name for part in NOT_DECODER)}


def shortest_names(model: nn.Module, adapted: set[str]) -> list[str]:
    """The last components of the module names `adapted`, sorted, or whole names if other modules end in one of them.

    PEFT adapts every module whose name ends in a target, also those of a projector.
    """
    last = {name.rpartition(".")[2] for name in adapted}
    others = (name for name, _ in model.named_modules() if name not in adapted)
    return sorted(adapted if any(name.rpartition(".")[2] in last for name in others) else last)


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Sorted last name components of `decoder_layers`: LoRA's target modules as published."""
    return sorted({name.rpartition(".")[2] for name in decoder_layers(model)})


def add_lora(model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments) -> PreTrainedModel:
    """Wrap `model` in a PEFT model. Call it before `add_vision`: tower layers can have the names of decoder layers.

    `add_tower_lora` extends the adapter to the vision tower.

    PEFT gets `bias="none"` for every `--lora_bias`: trained biases are saved in `non_lora_trainables`; those of
    the vision tower are never trained.
    """
    peft = require("peft", "train")
    settings = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_modules(model),
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
    )
    adapted = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = model_args.model_name_or_path
    snapshot = Path(model.config._name_or_path)
    if snapshot.parent.name == "snapshots":  # in the hub cache a snapshot folder is named by its commit
        settings.revision = snapshot.name
    logger.info("LoRA: rank %d, target modules %s.", args.lora_r, ", ".join(sorted(settings.target_modules)))
    return adapted


def add_tower_lora(adapted: PeftModel, args: TrainingArguments) -> None:
    """Extend the adapter to all linear layers of the loaded vision tower, with rank `--mm_vision_lora_r`.

    Its alpha gives the tower the scale of the decoder; with rsLoRA, whose scale fits every rank, it is `--lora_alpha`.
    """
    peft, tuner = require("peft", "train"), require("peft.tuners.tuners_utils", "train")
    settings, model = adapted.peft_config[ADAPTER], adapted.get_base_model()
    tower, rank = model.get_vision_tower().vision_tower, args.mm_vision_lora_r
    alpha = args.lora_alpha * (1 if args.use_rslora else rank / args.lora_r)
    own = copy.copy(settings)
    own.r, own.lora_alpha = rank, alpha
    own.target_modules = {name for name, module in tower.named_modules() if isinstance(module, nn.Linear)}
    for name, module in tower.named_modules():
        if getattr(module, "q_bias", None) is not None:  # timm's BEiT and EVA do not call such a layer
            own.target_modules.discard(f"{name}.qkv")
    peft.inject_adapter_in_model(own, tower, ADAPTER)
    layers = {name for name, module in model.named_modules() if isinstance(module, tuner.BaseTunerLayer)}
    settings.target_modules = set(shortest_names(model, layers))
    settings.rank_pattern, settings.alpha_pattern = {TOWER_PATTERN: rank}, {TOWER_PATTERN: alpha}
    logger.info("LoRA of the vision tower: rank %d, alpha %g, %d layers.", rank, alpha, len(own.target_modules))


def is_trained_with_lora(name: str, bias: str) -> bool:
    """Whether LoRA with `--lora_bias` `bias` trains the parameter `name` of the wrapped model."""
    if ".lora_" in name:
        return True
    of_target = name.endswith(".base_layer.bias")
    wanted = (bias == "lora_only" and of_target) or (bias == "all" and name.endswith("bias"))
    return wanted and not any(part in name for part in NOT_DECODER)


# --- Freeze policy, loss and precision --------------------------------------------------------------------------------


def default_freeze_policy(model: PreTrainedModel, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """Set `requires_grad` from the published flags.

    By default language model and projector are trained. `--tune_mm_mlp_adapter` and `--freeze_llm` freeze the language
    model, `--freeze_backbone` all of it but `lm_head`, `--lora_enable` all of it but the adapters (and biases by
    `--lora_bias`), `--freeze_mm_mlp_adapter` the projector. The vision tower is frozen except for its adapters and what
    `--unfreeze_mm_vision_tower` and `--tune_vit_pos_embedding` name. `--tune_mm_mlp_adapter` with
    `--mm_use_im_start_end` also trains the input embedding.
    """
    core = model.get_model()
    model.requires_grad_(not (model_args.tune_mm_mlp_adapter or training_args.freeze_llm or training_args.lora_enable))
    if model_args.freeze_backbone:
        core.requires_grad_(False)
    if training_args.lora_enable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained_with_lora(name, training_args.lora_bias))
    if model_args.tune_mm_mlp_adapter and model_args.mm_use_im_start_end:
        model.get_input_embeddings().requires_grad_(True)
    tower = model.get_vision_tower()
    if tower is None:
        return
    core.mm_projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if model_args.unfreeze_mm_vision_tower:
        unfreeze_vision_tower(tower, model_args.unfreeze_mm_vision_layers)
    if model_args.tune_vit_pos_embedding:
        table = getattr(getattr(tower.vision_tower, "embeddings", None), "position_embedding", None)
        if not isinstance(table, nn.Parameter):
            raise ConfigError(f"--tune_vit_pos_embedding needs an InternViT tower, got {model_args.vision_tower}.")
        table.requires_grad_(True)


def unfreeze_vision_tower(tower: VisionTower, last_layers: int) -> None:
    """Train the whole tower, or its `last_layers` layers up to the one whose features are used."""
    if not last_layers:
        tower.vision_tower.requires_grad_(True)
        return
    if tower.spec.layers is None or last_layers > tower.depth:
        raise ConfigError(
            f"--unfreeze_mm_vision_layers must be at most {tower.depth}, the number of layers that {tower.name} runs, "
            f"got {last_layers}."
        )
    for name, parameter in tower.vision_tower.named_parameters():
        index = layer_index(name, tower.spec.layers)
        parameter.requires_grad_(index is not None and index >= tower.depth - last_layers)


# `--freeze_policy`: functions that set `requires_grad` of the model, which has its vision modules and adapters.
FREEZE_POLICIES: dict[str, FreezePolicy] = {"default": default_freeze_policy}
# `--loss`: losses (C,) of float32 logits (C, V) and targets (C,) int64 of a chunk of supervised tokens; C can be 0.
LOSSES: dict[str, TokenLoss] = {"cross_entropy": CrossEntropy()}


def registered(flag: str, name: str, registry: Mapping[str, T]) -> T:
    """The entry of a registry that a flag names; raises `ConfigError` with the known names."""
    if name not in registry:
        raise ConfigError(f"{flag} must be one of {', '.join(sorted(registry))}, got {name!r}.")
    return registry[name]


def training_loss(args: TrainingArguments) -> TokenLoss:
    """The loss that `--loss`, `--label_smoothing_factor` and `--z_loss` select."""
    loss = registered("--loss", args.loss, LOSSES)
    if isinstance(loss, CrossEntropy):
        return replace(loss, label_smoothing=args.label_smoothing_factor, z_loss=args.z_loss)
    if args.label_smoothing_factor or args.z_loss:
        raise ConfigError(
            f"--label_smoothing_factor and --z_loss belong to --loss cross_entropy, got --loss {args.loss}; drop them."
        )
    return loss


def set_precision(model: nn.Module, dtype: torch.dtype, *, deepspeed: bool, quantized: bool = False) -> None:
    """Cast trainable parameters to float32 (master weights) and frozen ones to `dtype`; all to `dtype` for DeepSpeed.

    DeepSpeed keeps its own float32 masters; elsewhere autocast computes in 16 bits. With a `quantized` decoder the
    norms of the language model are float32, too, but not those of the vision tower, which computes in `dtype`.
    """
    for name, parameter in model.named_parameters():
        if not is_partitioned(parameter) and parameter.is_floating_point():
            norm = quantized and "norm" in name and not any(part in name for part in NOT_DECODER)
            master = (parameter.requires_grad or norm) and not deepspeed
            parameter.data = parameter.data.to(torch.float32 if master else dtype)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, partitioned ones in full; `TrainingError` if none is trainable."""
    sizes = [(parameter.requires_grad, torch.Size(full_shape(parameter)).numel()) for parameter in model.parameters()]
    trainable = sum(size for requires_grad, size in sizes if requires_grad)
    if not trainable:
        raise TrainingError("These flags freeze every parameter, so nothing would be trained; drop a --freeze_* flag.")
    return trainable, sum(size for _, size in sizes)


# --- Saved parameters ------------------------------------------------------------------------------------------------


def save_format(model: nn.Module) -> SaveFormat:
    """What checkpoints of this model hold: adapters, the projector alone, or all weights."""
    if hasattr(model, "peft_config"):
        return "lora"
    return "projector" if getattr(model.config, "tune_mm_mlp_adapter", False) else "full"


def saved_parameters(model: nn.Module, saves: SaveFormat) -> NamedParameters:
    """The parameters a checkpoint holds, by their names in the files.

    "full" holds all. "projector" holds the projector, the input embeddings with `mm_use_im_start_end`, and the position
    embedding with `tune_vit_pos_embedding`. "lora" holds the adapter weights (`.lora_` in the name) and, for
    `non_lora_trainables`, the projector, everything else that is trained, and the embeddings when image tokens gave
    them new rows.
    """
    named = list(model.named_parameters())
    if saves == "full":
        return named
    config = model.config
    start_end = getattr(config, "mm_use_im_start_end", False)
    keys = ["mm_projector", "vision_resampler"]
    if saves == "projector":
        keys += ["embed_tokens", "embed_in", "wte"] if start_end else []
        keys += [POSITION_EMBEDDING] if getattr(config, "tune_vit_pos_embedding", False) else []
        return [(name, parameter) for name, parameter in named if any(key in name for key in keys)]
    if start_end or getattr(config, "mm_use_im_patch_token", False):
        keys += ["embed_tokens", "wte", "lm_head"]
    return [
        (file_name(name), parameter)
        for name, parameter in named
        if ".lora_" in name or parameter.requires_grad or any(key in name for key in keys)
    ]


def file_name(name: str) -> str:
    """The name under which a LoRA run saves a parameter, for adapter weights that of PEFT."""
    if ".lora_magnitude_vector." in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}." if ".lora_" in name else ".base_layer.", ".")


def saved_shapes(model: nn.Module, saves: SaveFormat) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor that a checkpoint must hold."""
    return {name: full_shape(parameter) for name, parameter in saved_parameters(model, saves)}
