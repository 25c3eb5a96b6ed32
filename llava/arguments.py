"""Flags of the training entry points (spec/train.md §7), checked before anything is loaded.

Three groups, as published: model, data, training (the last on top of transformers' own). Every problem of a command
line is reported at once, by flag name; `parse_arguments` is the one way from `argv` to the three objects.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import transformers
from transformers.training_args import OptimizerNames

from llava.errors import ConfigError
from llava.train import reporting

logger = logging.getLogger(__name__)
SELECT_FEATURES = ("patch", "cls_patch")
LORA_BIASES = ("none", "all", "lora_only")


class FlagProblems(ConfigError):
    """All that is wrong with one group of flags; `problems` holds the sentences."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(" ".join(self.problems))


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise FlagProblems(problems)


@dataclass
class ModelArguments:
    """Which models are joined, and how."""

    model_name_or_path: str = _flag("facebook/opt-125m", "base language model, or a checkpoint to go on from")
    version: str = _flag("v0", "conversation template (spec/train.md §8.1): plain, v1, ...")
    freeze_backbone: bool = _flag(False, "freeze the language model's layers; its head stays trainable")
    tune_mm_mlp_adapter: bool = _flag(False, "stage 1: train and save the projector only")
    tune_vit_pos_embedding: bool = _flag(False, "also train the tower's position embedding")
    unfreeze_mm_vision_tower: bool = _flag(False, "also train the tower, in full or by --unfreeze_mm_vision_layers")
    unfreeze_mm_vision_layers: int = _flag(
        0, "of the tower, train only so many of the last layers used; 0 is all of it"
    )
    vision_tower: str | None = _flag(None, "vision tower directory or hub name; none trains a plain language model")
    mm_vision_select_layer: int = _flag(-1, "layer of the tower whose output is used; negative counts from the end")
    mm_vision_image_size: int | None = _flag(None, "side of the tower's input in pixels; default from the tower's name")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "mm_projector.bin of stage 1 to start from")
    mm_projector_type: str = _flag("linear", "linear, mlp{N}x_gelu, mlp{N}x_gelu_ln or identity")
    mm_use_im_start_end: bool = _flag(False, "wrap every image in <im_start> and <im_end>")
    mm_use_im_patch_token: bool = _flag(True, "add <im_patch> to the vocabulary")
    mm_vision_select_feature: str = _flag("patch", "patch, or cls_patch to keep the class token")
    attn_implementation: str = _flag("auto", "auto, sdpa, eager or flash_attention_2, for the language model")

    def __post_init__(self) -> None:
        problems = []
        if self.mm_vision_select_feature not in SELECT_FEATURES:
            problems.append(f"--mm_vision_select_feature is {self.mm_vision_select_feature!r}; use patch or cls_patch.")
        if self.mm_vision_image_size is not None and self.mm_vision_image_size <= 0:
            problems.append(f"--mm_vision_image_size is {self.mm_vision_image_size}; give a positive number of pixels.")
        needing_tower = {
            "--tune_mm_mlp_adapter": self.tune_mm_mlp_adapter,
            "--tune_vit_pos_embedding": self.tune_vit_pos_embedding,
            "--unfreeze_mm_vision_tower": self.unfreeze_mm_vision_tower,
            "--pretrain_mm_mlp_adapter": self.pretrain_mm_mlp_adapter,
            "--mm_use_im_start_end": self.mm_use_im_start_end,
        }
        given = [name for name, value in needing_tower.items() if value]
        if self.vision_tower is None and given:
            problems.append(f"{', '.join(given)} needs --vision_tower, which is missing.")
        if self.unfreeze_mm_vision_layers < 0:
            problems.append(f"--unfreeze_mm_vision_layers is {self.unfreeze_mm_vision_layers}; give 0 or more layers.")
        if self.unfreeze_mm_vision_layers and not self.unfreeze_mm_vision_tower:
            problems.append("--unfreeze_mm_vision_layers needs --unfreeze_mm_vision_tower True, which is missing.")
        _raise(problems)


@dataclass
class DataArguments:
    """What is trained on."""

    data_path: str | None = _flag(None, "annotation file (spec/train.md §3.1)")
    meta_path: str | None = _flag(None, "mixture file (spec/train.md §3.2), instead of --data_path")
    lazy_preprocess: bool = _flag(False, "accepted for compatibility; loading is always lazy")
    is_multimodal: bool = _flag(False, "set by --vision_tower")
    image_folder: str | None = _flag(None, "prefix of every record's image path")
    image_aspect_ratio: str = _flag("square", "pad keeps the whole image; anything else resizes and crops")
    image_grid_pinpoints: str | None = _flag(None, "accepted for compatibility; stored, never read")
    on_bad_sample: str = _flag("error", "error stops at a bad record; skip replaces it deterministically and counts")
    eval_data_path: str | None = _flag(None, "annotation file to validate on, at every save unless told otherwise")
    validation_fraction: float = _flag(0.0, "instead of a file: this share of the data, drawn by --seed, is held out")
    eval_generations: int = _flag(4, "records of the validation set that are answered at every evaluation")

    def __post_init__(self) -> None:
        problems = []
        if self.on_bad_sample not in ("error", "skip"):
            problems.append(f"--on_bad_sample is {self.on_bad_sample!r}; use error or skip.")
        if self.data_path and self.meta_path:
            problems.append("--data_path and --meta_path are both given; keep one of them.")
        if not 0 <= self.validation_fraction < 1:
            problems.append(
                f"--validation_fraction is {self.validation_fraction}; give a share of at least 0, below 1."
            )
        if self.eval_data_path and self.validation_fraction:
            problems.append("--eval_data_path and --validation_fraction are both given; keep one of them.")
        _raise(problems)

    @property
    def validates(self) -> bool:
        """Whether the run has a validation set."""
        return bool(self.eval_data_path or self.validation_fraction)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; everything transformers 4.36.2 knows, and the flags below."""

    cache_dir: str | None = _flag(None, "accepted for compatibility; HF_HUB_CACHE moves the cache of downloads")
    optim: str = _flag("adamw_torch", "optimizer")
    remove_unused_columns: bool = _flag(False, "must stay false: the data set yields what the model takes")
    freeze_mm_mlp_adapter: bool = _flag(False, "freeze the projector")
    freeze_llm: bool = _flag(False, "freeze all but the projector, yet save the full model")
    mpt_attn_impl: str = _flag("triton", "accepted for compatibility; MPT bases only")
    model_max_length: int = _flag(512, "longest sequence in tokens, images unexpanded; longer ones are cut")
    double_quant: bool = _flag(True, "4-bit: quantise the scales too")
    quant_type: str = _flag("nf4", "4-bit: nf4 or fp4")
    bits: int = _flag(16, "16, or 8 / 4 to quantise the frozen base")
    lora_enable: bool = _flag(False, "train low-rank adapters instead of the language model")
    lora_r: int = _flag(64, "rank of the adapters")
    lora_alpha: int = _flag(16, "scale of the adapters")
    lora_dropout: float = _flag(0.05, "dropout before the adapters")
    lora_weight_path: str = _flag("", "accepted for compatibility; never read")
    lora_bias: str = _flag("none", "none, all or lora_only")
    group_by_modality_length: bool = _flag(False, "batch samples of one modality and similar length")
    report_to: list[str] | None = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "auto (tensorboard where installed), none, tensorboard, wandb; log.jsonl always"},
    )
    plot_loss: bool = _flag(True, "write loss.png at every save and at the end (needs matplotlib)")
    global_batch_size: int | None = _flag(None, "samples of one optimizer step; sets --gradient_accumulation_steps")
    deterministic: bool = _flag(False, "equal runs on equal machines to the last bit, at some cost in speed")
    step_timeout: float = _flag(
        1800.0, "seconds without a step after which stacks are written and the run ends; 0 never"
    )

    def __post_init__(self) -> None:
        _raise(self._problems())
        self.report_to = reporting.usable(self.report_to)
        if self.load_best_model_at_end:
            _evaluate_with_saves(self)
        if self.gradient_checkpointing:  # reentrant as published, and as ZeRO-3 needs it
            given: dict[str, Any] | None = getattr(self, "gradient_checkpointing_kwargs", None)
            self.gradient_checkpointing_kwargs = given or {"use_reentrant": True}
        if self.lora_enable and getattr(self, "ddp_find_unused_parameters", None) is None:
            self.ddp_find_unused_parameters = False  # all that learns is used in every step; looking costs, and fails
        # the flags decide: the library takes over what an earlier run in this process, or a launcher, left here
        os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise FlagProblems([f"transformers refuses these flags: {error}"]) from error
        if self.global_batch_size:
            self._accumulate(self.global_batch_size)

    def _accumulate(self, global_batch: int) -> None:
        """Accumulation steps from the global batch, which the processes must be able to share in equal parts."""
        at_once = self.train_batch_size * self.world_size
        if global_batch % at_once:
            raise FlagProblems(
                [
                    f"--global_batch_size {global_batch} is not a multiple of {at_once}, which {self.world_size} "
                    f"processes take with --per_device_train_batch_size {self.per_device_train_batch_size}."
                ]
            )
        self.gradient_accumulation_steps = global_batch // at_once

    def _problems(self) -> list[str]:
        problems = []
        if self.bits not in (4, 8, 16):
            problems.append(f"--bits is {self.bits}; use 4, 8 or 16.")
        if self.quant_type not in ("nf4", "fp4"):
            problems.append(f"--quant_type is {self.quant_type!r}; use nf4 or fp4.")
        if self.lora_bias not in LORA_BIASES:
            problems.append(f"--lora_bias is {self.lora_bias!r}; use {', '.join(LORA_BIASES)}.")
        if self.lora_enable and (self.lora_r <= 0 or not 0 <= self.lora_dropout < 1):
            problems.append("--lora_r must be positive and --lora_dropout in [0, 1).")
        if self.lora_enable and self.freeze_llm:
            problems.append("--freeze_llm with --lora_enable would freeze the adapters too; drop one of them.")
        if self.bits in (4, 8) and not self.lora_enable:
            problems.append(f"--bits {self.bits} packs the weights, which then cannot learn; add --lora_enable True.")
        if self.bits in (4, 8) and self.lora_bias != "none":
            problems.append("--lora_bias all or lora_only cannot train the biases of packed layers; use none.")
        if self.model_max_length <= 0:
            problems.append(f"--model_max_length is {self.model_max_length}; give a positive number of tokens.")
        if self.deepspeed and (self.use_cpu or self.no_cuda):
            problems.append(
                "--use_cpu with --deepspeed makes the library train without DeepSpeed; leave --use_cpu out."
            )
        if self.remove_unused_columns:
            problems.append("--remove_unused_columns True would drop the images; leave it out.")
        if self.load_best_model_at_end and (self.save_strategy == "no" or (self.deepspeed and self.save_only_model)):
            flag = "--save_strategy no" if self.save_strategy == "no" else "--save_only_model with --deepspeed"
            problems.append(f"--load_best_model_at_end needs checkpoints to load from; leave {flag} out.")
        if self.step_timeout < 0:
            problems.append(f"--step_timeout is {self.step_timeout}; give seconds, or 0 to wait forever.")
        if self.label_smoothing_factor:
            problems.append("--label_smoothing_factor needs logits at all positions, which training does not compute.")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            problems.append("--torch_compile does not compile this model; leave it out.")
        if self.fsdp:
            problems.append("--fsdp is not supported; use --deepspeed scripts/zero3.json.")
        return problems + _number_problems(self)


def _evaluate_with_saves(args: Any) -> None:
    """As `llava.train.validation` does for every run; the library looks for it before that."""
    if args.evaluation_strategy == "no":
        args.evaluation_strategy, args.eval_steps = args.save_strategy, args.save_steps


def _number_problems(args: TrainingArguments) -> list[str]:
    seeds = (("seed", args.seed), ("data_seed", args.data_seed))
    positive = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
    problems = [
        f"--{name} is {getattr(args, name)}; it must be positive." for name in positive if getattr(args, name) <= 0
    ]
    problems += [f"--{name} is {value}; it must not be negative." for name, value in seeds if (value or 0) < 0]
    if args.learning_rate < 0:
        problems.append(f"--learning_rate is {args.learning_rate}; it must not be negative.")
    if args.num_train_epochs <= 0 and args.max_steps <= 0:
        problems.append("--num_train_epochs and --max_steps are both not positive; nothing would be trained.")
    return problems


class _Parser(transformers.HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See --help.")


def together(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> list[str]:
    """Problems that only show when the three groups are seen together."""
    problems = []
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        problems.append("--tune_mm_mlp_adapter with --freeze_mm_mlp_adapter leaves nothing to train; drop one of them.")
    if training.freeze_llm and training.freeze_mm_mlp_adapter:
        problems.append("--freeze_llm with --freeze_mm_mlp_adapter leaves nothing to train; drop one of them.")
    for name in ("freeze_mm_mlp_adapter", "freeze_llm"):
        if getattr(training, name) and model.vision_tower is None:
            problems.append(f"--{name} needs --vision_tower, which is missing.")
    if model.tune_mm_mlp_adapter and training.lora_enable:
        problems.append("--lora_enable with --tune_mm_mlp_adapter would train no adapter; drop one of them.")
    if training.lora_enable and model.vision_tower is None:
        problems.append("--lora_enable needs --vision_tower, which is missing.")
    if training.lora_enable and model.tune_vit_pos_embedding:
        problems.append("--tune_vit_pos_embedding cannot be saved with --lora_enable; drop one of them.")
    if model.unfreeze_mm_vision_tower and (training.lora_enable or model.tune_mm_mlp_adapter):
        other = "--lora_enable" if training.lora_enable else "--tune_mm_mlp_adapter"
        problems.append(f"--unfreeze_mm_vision_tower cannot be saved with {other}; drop one of them.")
    if data.validates and training.save_strategy == "no" and training.evaluation_strategy == "no":
        problems.append("--save_strategy no leaves no time to validate at; give --evaluation_strategy steps or epoch.")
    if training.do_eval and not data.validates:
        problems.append("--evaluation_strategy needs --eval_data_path or --validation_fraction, which are missing.")
    if not data.data_path and not data.meta_path:
        problems.append("--data_path is missing: give the annotation file (or --meta_path, a mixture).")
    return problems


def make_parser() -> argparse.ArgumentParser:
    """The parser of all entry points; unique prefixes of flags are accepted, as in the published scripts."""
    return _Parser((ModelArguments, DataArguments, TrainingArguments), prog="llava train")


def use_fused_adamw(args: TrainingArguments) -> None:
    """Use fused AdamW instead of the default where possible: same update, no temporary copies.

    On CUDA the default (foreach) updates all parameters at once through lists of temporaries, several bytes per
    parameter at the peak. DeepSpeed has its own flat partitions. float16 keeps the default: the gradient scaler passes
    overflowing steps on to a fused optimizer, and the learning rate schedule would count them.
    """
    if args.optim != "adamw_torch" or args.device.type != "cuda" or args.fp16 or args.deepspeed_plugin is not None:
        return
    args.optim = OptimizerNames.ADAMW_TORCH_FUSED
    if args.process_index == 0:
        logger.info("Using --optim adamw_torch_fused on CUDA; pass --optim adamw_torch for the unfused optimizer.")


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse and check; raises one `ConfigError` that names every faulty flag."""
    parsed = make_parser().parse_args(list(argv), argparse.Namespace(optim=None))  # None: not on the command line
    default_optim = parsed.optim is None
    if default_optim:
        parsed.optim = TrainingArguments.optim
    namespace = vars(parsed)
    built: list[Any] = []
    problems: list[str] = []
    for kind in (ModelArguments, DataArguments, TrainingArguments):
        try:
            built.append(kind(**{f.name: namespace[f.name] for f in fields(kind) if f.init}))
        except FlagProblems as error:
            problems += error.problems
    if len(built) == 3:
        problems += together(*built)
    _raise(problems)
    model, data, training = built
    if default_optim:
        use_fused_adamw(training)
    for name, used in (
        ("--cache_dir", training.cache_dir),
        ("--lora_weight_path", training.lora_weight_path),
        ("--image_grid_pinpoints", data.image_grid_pinpoints),
    ):
        if used:
            logger.warning("%s is accepted for compatibility and has no effect.", name)
    return model, data, training
