"""Command-line arguments of training, validated before anything is loaded.

`parse_arguments` turns `argv` into the three published groups (model, data, training; the last extends the
`TrainingArguments` of transformers) and reports every problem of a command line at once, by flag name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Final, NoReturn, TypeVar

import transformers
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from llava.errors import ConfigError

logger = logging.getLogger(__name__)
SELECT_FEATURES: Final = ("patch", "cls_patch")
ASPECT_RATIOS: Final = ("square", "pad")
LORA_BIASES: Final = ("none", "all", "lora_only")
POSITIVE: Final = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "eval_steps"),
    *("save_total_limit", "global_batch_size", "loss_group_size", "micro_batch_tokens"),
)
NOT_NEGATIVE: Final = (
    *("seed", "data_seed", "learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "max_grad_norm"),
    *("dataloader_num_workers", "mm_vision_lora_r", "label_smoothing_factor", "z_loss"),
)
REPORTERS: Final = {"tensorboard": "tensorboard", "wandb": "wandb"}  # name in --report_to -> package
NO_COMPILE: Final = (
    "torch fails to compile the decoder layers for packed batches with dynamic shapes, see docs/Performance.md"
)
# Flags of transformers that would have no effect, or another one than documented, and what to do instead.
UNSUPPORTED: Final = {
    "auto_find_batch_size": "`llava estimate` finds a batch size that fits",
    "dispatch_batches": "each process loads its own batches",
    "fsdp": "use --deepspeed scripts/zero3.json",
    "hub_token": "set HF_TOKEN, or run `huggingface-cli login`",
    "ignore_data_skip": "a resumed run continues with the next record",
    "include_num_input_tokens_seen": "log.jsonl counts tokens",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_organization": "use --hub_model_id ORGANIZATION/NAME",
    "push_to_hub_token": "set HF_TOKEN, or run `huggingface-cli login`",
    "split_batches": "--per_device_train_batch_size is the batch size of a process",
    "torch_compile": NO_COMPILE,
    "torch_compile_backend": NO_COMPILE,
    "torch_compile_mode": NO_COMPILE,
}
T = TypeVar("T")


class FlagProblems(ConfigError):
    """Every problem of one group of flags; `problems` holds one sentence each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(" ".join(self.problems))


def _flag(default: T, text: str) -> T:
    return field(default=default, metadata={"help": text})


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise FlagProblems(problems)


@dataclass
class ModelArguments:
    """Model components and how they are joined."""

    version_given = True  # false if --version was not on the command line
    model_name_or_path: str = _flag("facebook/opt-125m", "base language model, or a chat checkpoint to fine-tune")
    version: str = _flag("v0", "conversation template: plain for stage 1, v1 for stage 2, ...")
    freeze_backbone: bool = _flag(False, "freeze the language model's layers; lm_head stays trainable")
    tune_mm_mlp_adapter: bool = _flag(False, "stage 1: train and save the projector only")
    tune_vit_pos_embedding: bool = _flag(False, "train the position embedding of the vision tower, too")
    unfreeze_mm_vision_tower: bool = _flag(False, "train the vision tower, too (see --unfreeze_mm_vision_layers)")
    unfreeze_mm_vision_layers: int = _flag(
        0, "number of vision tower layers to train, counted back from the selected layer; 0 trains the whole tower"
    )
    vision_tower: str | None = _flag(None, "vision tower directory or hub name; without it the model is text-only")
    mm_vision_select_layer: int = _flag(-1, "vision tower layer whose output is used; negative counts from the end")
    mm_vision_image_size: int | None = _flag(None, "input size of the vision tower in pixels (default: the tower's)")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "mm_projector.bin or .safetensors of stage 1 to start from")
    mm_projector_type: str = _flag("linear", "linear, mlp{N}x_gelu, mlp{N}x_gelu_ln or identity")
    mm_use_im_start_end: bool = _flag(False, "wrap every image in <im_start> and <im_end>")
    mm_use_im_patch_token: bool = _flag(True, "add <im_patch> to the vocabulary")
    mm_vision_select_feature: str = _flag("patch", "patch, or cls_patch to keep the class token")
    attn_implementation: str = _flag("auto", "attention of the language model: auto, sdpa, eager or flash_attention_2")

    def __post_init__(self) -> None:
        problems = []
        if self.mm_vision_select_feature not in SELECT_FEATURES:
            problems.append(
                f"--mm_vision_select_feature must be patch or cls_patch, got {self.mm_vision_select_feature!r}."
            )
        if self.mm_vision_image_size is not None and self.mm_vision_image_size <= 0:
            problems.append(f"--mm_vision_image_size must be at least 1 pixel, got {self.mm_vision_image_size}.")
        needs_tower = (
            "tune_mm_mlp_adapter",
            "tune_vit_pos_embedding",
            "unfreeze_mm_vision_tower",
            "pretrain_mm_mlp_adapter",
            "mm_use_im_start_end",
        )
        given = [f"--{name}" for name in needs_tower if getattr(self, name)]
        if self.vision_tower is None and given:
            problems.append(f"{', '.join(given)} requires --vision_tower.")
        if self.unfreeze_mm_vision_layers < 0:
            problems.append(f"--unfreeze_mm_vision_layers must be at least 0, got {self.unfreeze_mm_vision_layers}.")
        if self.unfreeze_mm_vision_layers and not self.unfreeze_mm_vision_tower:
            problems.append("--unfreeze_mm_vision_layers requires --unfreeze_mm_vision_tower True.")
        _raise(problems)


@dataclass
class DataArguments:
    """Training and validation data."""

    data_path: str | None = _flag(None, "annotation file: .json, .jsonl or .parquet")
    meta_path: str | None = _flag(None, "mixture file (a JSON object of named data sets) instead of --data_path")
    lazy_preprocess: bool = _flag(False, "accepted for compatibility; loading is always lazy")
    is_multimodal: bool = _flag(False, "set by --vision_tower")
    image_folder: str | None = _flag(None, "folder that image paths are relative to")
    image_aspect_ratio: str = _flag("square", "square resizes and crops the image, pad keeps all of it")
    image_grid_pinpoints: str | None = _flag(None, "accepted for compatibility; stored in the config, never read")
    on_bad_sample: str = _flag("error", "error stops at a bad record; skip replaces it deterministically and counts it")
    eval_data_path: str | None = _flag(None, "annotation file of the validation set, evaluated at every save")
    validation_fraction: float = _flag(0.0, "fraction of the data to hold out for validation, drawn with --seed")
    eval_generations: int = _flag(4, "number of validation records to generate answers for at every evaluation")

    def __post_init__(self) -> None:
        problems = []
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            problems.append(f"--image_aspect_ratio must be square or pad, got {self.image_aspect_ratio!r}.")
        if self.on_bad_sample not in ("error", "skip"):
            problems.append(f"--on_bad_sample must be error or skip, got {self.on_bad_sample!r}.")
        if self.data_path and self.meta_path:
            problems.append("--data_path and --meta_path exclude each other; pass one of them.")
        if not 0 <= self.validation_fraction < 1:
            problems.append(f"--validation_fraction must be in [0, 1), got {self.validation_fraction}.")
        if self.eval_data_path and self.validation_fraction:
            problems.append("--eval_data_path and --validation_fraction exclude each other; pass one of them.")
        _raise(problems)

    @property
    def validates(self) -> bool:
        """Whether the run has a validation set."""
        return bool(self.eval_data_path or self.validation_fraction)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Optimization, LoRA, quantization and logging; extends the arguments of transformers 4.36.2."""

    cache_dir: str | None = _flag(None, "accepted for compatibility; set HF_HUB_CACHE to move the download cache")
    optim: str = _flag("adamw_torch", "optimizer")
    remove_unused_columns: bool = _flag(False, "must stay False: the data set yields exactly the model's inputs")
    freeze_mm_mlp_adapter: bool = _flag(False, "freeze the projector")
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector (default: that of --learning_rate)")
    mm_vision_tower_lr: float | None = _flag(
        None, "learning rate of the vision tower (default: that of --learning_rate)"
    )
    mm_vision_layer_decay: float | None = _flag(None, "layer-wise learning rate decay in the vision tower, such as 0.9")
    llm_layer_decay: float | None = _flag(None, "layer-wise learning rate decay in the language model, such as 0.9")
    freeze_llm: bool = _flag(False, "freeze everything except the projector, but save the full model")
    freeze_policy: str = _flag("default", "freeze policy: a name in llava.train.model_setup.FREEZE_POLICIES")
    loss: str = _flag("cross_entropy", "training loss: a name in llava.train.model_setup.LOSSES")
    z_loss: float = _flag(0.0, "coefficient of the z-loss, the squared log-partition function, such as 1e-4")
    mpt_attn_impl: str = _flag("triton", "accepted for compatibility; MPT only")
    model_max_length: int = _flag(512, "maximum sequence length in tokens (an image counts as one); truncates")
    double_quant: bool = _flag(True, "4-bit: quantize the scales, too")
    quant_type: str = _flag("nf4", "4-bit: nf4 or fp4")
    bits: int = _flag(16, "16, or 8 / 4 to quantize the frozen base model")
    lora_enable: bool = _flag(False, "train LoRA adapters instead of the language model")
    lora_r: int = _flag(64, "LoRA rank")
    lora_alpha: int = _flag(16, "LoRA scaling")
    lora_dropout: float = _flag(0.05, "LoRA dropout")
    lora_weight_path: str = _flag("", "accepted for compatibility; never read")
    lora_bias: str = _flag("none", "biases to train with LoRA: none, all or lora_only")
    mm_vision_lora_r: int = _flag(0, "LoRA rank of the vision tower; 0 adds no adapters to it")
    use_dora: bool = _flag(False, "weight-decomposed adapters (DoRA, arXiv:2402.09353)")
    use_rslora: bool = _flag(False, "scale adapters by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)")
    group_by_modality_length: bool = _flag(False, "batch samples of the same modality and similar length")
    disable_tqdm: bool | None = _flag(False, "disable the progress bar; it is drawn on terminals only")
    report_to: list[str] | None = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "auto (TensorBoard if installed), none, tensorboard, wandb; log.jsonl is always written"},
    )
    plot_loss: bool = _flag(True, "draw loss.png at every save and at the end (needs matplotlib)")
    gradient_accumulation_steps: int = _flag(1, "micro-batches per step and process, without --global_batch_size")
    global_batch_size: int | None = _flag(
        None, "samples per optimizer step (default: per-device batch x accumulation steps x processes)"
    )
    loss_group_size: int | None = _flag(
        None, "the loss of a step is the mean over groups of this many samples (default: --per_device_train_batch_size)"
    )
    micro_batch_tokens: int | None = _flag(
        None, "pack the samples of a step into micro-batches of at most this many tokens, images expanded"
    )
    deterministic: bool = _flag(False, "bit-identical runs on identical machines, at some cost in speed")
    step_timeout: float = _flag(
        1800.0, "seconds without a step after which stacks are dumped and the run ends; 0 disables the watchdog"
    )
    profile_step_start: int | None = _flag(None, "first step to trace with torch.profiler; steps count from 1")
    profile_step_end: int | None = _flag(None, "last step to trace (default: only that of --profile_step_start)")
    memory_snapshot: bool = _flag(
        False, "record CUDA allocations; write them after the traced steps, and when memory runs out"
    )

    def __post_init__(self) -> None:
        _raise(self._problems())
        self.report_to = usable_reporters(self.report_to)
        if self.load_best_model_at_end and self.evaluation_strategy == "no":
            self.__dict__.update(evaluation_strategy=self.save_strategy, eval_steps=self.save_steps)
        if self.gradient_checkpointing and not getattr(self, "gradient_checkpointing_kwargs", None):
            self.gradient_checkpointing_kwargs = {"use_reentrant": True}  # as published; ZeRO-3 needs it
        if self.lora_enable and getattr(self, "ddp_find_unused_parameters", None) is None:
            self.ddp_find_unused_parameters = False  # every trainable parameter is used in every step
        # Libraries see each step as one batch; the trainer accumulates.
        accumulation, self.gradient_accumulation_steps = int(self.gradient_accumulation_steps), 1
        # The library prefers what a launcher or an earlier run in this process left in the environment.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise FlagProblems([f"transformers rejected the flags: {error}"]) from error
        self._set_step(accumulation)

    def _set_step(self, accumulation: int) -> None:
        """Set the samples of a step and of a loss group."""
        batch = self.per_device_train_batch_size
        implied = batch * accumulation * self.world_size
        step, group = self.global_batch_size or implied, self.loss_group_size or batch
        if accumulation > 1 and step != implied:
            raise FlagProblems(
                [
                    f"--global_batch_size {step} contradicts --gradient_accumulation_steps {accumulation}, which makes "
                    f"{implied} with {batch} per device and {self.world_size} processes; drop one."
                ]
            )
        if step % group:
            name = "loss_group_size" if self.loss_group_size else "per_device_train_batch_size"
            raise FlagProblems(
                [
                    f"--global_batch_size {step} must be a multiple of --{name} {group}; pass a --loss_group_size that "
                    "divides it, such as the batch size per GPU of the recipe."
                ]
            )
        self.global_batch_size, self.loss_group_size = step, group

    def _problems(self) -> list[str]:
        problems = []
        if self.bits not in (4, 8, 16):
            problems.append(f"--bits must be 4, 8 or 16, got {self.bits}.")
        if self.quant_type not in ("nf4", "fp4"):
            problems.append(f"--quant_type must be nf4 or fp4, got {self.quant_type!r}.")
        if self.lora_bias not in LORA_BIASES:
            problems.append(f"--lora_bias must be one of {', '.join(LORA_BIASES)}, got {self.lora_bias!r}.")
        if self.lora_enable and (self.lora_r <= 0 or not 0 <= self.lora_dropout < 1):
            problems.append("--lora_r must be at least 1 and --lora_dropout in [0, 1).")
        if self.lora_enable and self.freeze_llm:
            problems.append("--freeze_llm with --lora_enable would freeze the adapters; drop one of them.")
        for name in ("mm_vision_lora_r", "use_dora", "use_rslora"):
            if getattr(self, name) and not self.lora_enable:
                problems.append(f"--{name} requires --lora_enable True.")
        if self.use_dora and self.bits != 16:
            problems.append(f"--use_dora needs the norms of whole weights; drop --bits {self.bits}, or --use_dora.")
        for name in ("mm_vision_layer_decay", "llm_layer_decay"):
            if not 0 < (1.0 if getattr(self, name) is None else getattr(self, name)) <= 1:
                problems.append(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}.")
        if self.bits in (4, 8) and not self.lora_enable:
            problems.append(f"--bits {self.bits} makes the weights untrainable; add --lora_enable True.")
        if self.bits in (4, 8) and self.lora_bias != "none":
            problems.append("--lora_bias must be none with --bits 4 or 8: quantized layers have no trainable bias.")
        if self.model_max_length <= 0:
            problems.append(f"--model_max_length must be at least 1, got {self.model_max_length}.")
        if self.deepspeed and (self.use_cpu or self.no_cuda):
            problems.append("--use_cpu with --deepspeed would train without DeepSpeed; drop --use_cpu.")
        if self.label_smoothing_factor >= 1:
            problems.append(f"--label_smoothing_factor must be below 1, got {self.label_smoothing_factor}.")
        if self.remove_unused_columns:
            problems.append("--remove_unused_columns must be False: True would drop the images.")
        if self.load_best_model_at_end and (self.save_strategy == "no" or (self.deepspeed and self.save_only_model)):
            flag = "--save_strategy no" if self.save_strategy == "no" else "--save_only_model with --deepspeed"
            problems.append(f"--load_best_model_at_end needs checkpoints to load from; drop {flag}.")
        if self.step_timeout < 0:
            problems.append(f"--step_timeout must be at least 0 seconds, got {self.step_timeout}; 0 waits forever.")
        problems += self._profile_problems() + self._hub_problems()
        problems += [
            f"--{name} is not supported: {instead}." for name, instead in UNSUPPORTED.items() if getattr(self, name)
        ]
        unknown = set(_names(self.report_to)) - {*INTEGRATION_TO_CALLBACK, "auto", "all", "none"}
        if unknown:
            names = ", ".join(("auto", "all", "none", *INTEGRATION_TO_CALLBACK))
            problems.append(f"--report_to must be among {names}, got {', '.join(sorted(unknown))}.")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                problems.append(f"--{name} must be greater than 0, got {getattr(self, name)}.")
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                problems.append(f"--{name} must be at least 0, got {getattr(self, name)}.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            problems.append("--num_train_epochs or --max_steps must be greater than 0.")
        return problems

    def _profile_problems(self) -> list[str]:
        start, end = self.profile_step_start, self.profile_step_end
        if start is None:
            return [] if end is None else ["--profile_step_end requires --profile_step_start."]
        if start < 1:
            return [f"--profile_step_start must be at least 1, got {start}."]
        if end is not None and end < start:
            return [f"--profile_step_end must be at least --profile_step_start ({start}), got {end}."]
        return []

    def _hub_problems(self) -> list[str]:
        if not self.hub_model_id:
            return []
        if not self.push_to_hub:
            return ["--hub_model_id requires --push_to_hub True."]
        try:
            validate_repo_id(self.hub_model_id)
        except ValueError:
            return [f"--hub_model_id must be NAME or ORGANIZATION/NAME, got {self.hub_model_id!r}."]
        return []


def _names(names: Sequence[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ["none"])


def usable_reporters(names: Sequence[str] | str | None) -> list[str]:
    """Resolve `--report_to` to the reporters whose package is installed; "auto" is TensorBoard where installed."""
    wanted = _names(names)
    if "auto" in wanted:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else ["none"]
    found = []
    for name in list(REPORTERS) if wanted == ["all"] else [name for name in wanted if name != "none"]:
        package = REPORTERS.get(name, name)
        if importlib.util.find_spec(package):
            found.append(name)
        else:
            logger.warning(
                "--report_to %s: the package %s is not installed; metrics go to log.jsonl only.", name, package
            )
    return found or ["none"]


class _Parser(transformers.HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See --help.")


def check_combinations(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> list[str]:
    """Problems between flags of different groups."""
    problems = []
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        problems.append("--tune_mm_mlp_adapter with --freeze_mm_mlp_adapter leaves nothing to train; drop one of them.")
    if training.freeze_llm and training.freeze_mm_mlp_adapter:
        problems.append("--freeze_llm with --freeze_mm_mlp_adapter leaves nothing to train; drop one of them.")
    if training.freeze_mm_mlp_adapter and training.mm_projector_lr is not None:
        problems.append("--mm_projector_lr with --freeze_mm_mlp_adapter has no effect; drop one of them.")
    for name in ("freeze_mm_mlp_adapter", "freeze_llm", "lora_enable", "mm_projector_lr"):
        if getattr(training, name) and model.vision_tower is None:
            problems.append(f"--{name} requires --vision_tower.")
    tower = model.unfreeze_mm_vision_tower or model.tune_vit_pos_embedding or training.mm_vision_lora_r
    for name in ("mm_vision_tower_lr", "mm_vision_layer_decay"):
        if getattr(training, name) is not None and not tower and training.freeze_policy == "default":
            problems.append(
                f"--{name} has no effect on a frozen vision tower; train it with --unfreeze_mm_vision_tower True or "
                "--mm_vision_lora_r, or drop it."
            )
    frozen = "tune_mm_mlp_adapter" if model.tune_mm_mlp_adapter else "freeze_llm" if training.freeze_llm else ""
    if training.llm_layer_decay is not None and frozen:
        problems.append(f"--llm_layer_decay with --{frozen} has no effect; drop one of them.")
    if model.tune_mm_mlp_adapter and training.lora_enable:
        problems.append("--lora_enable with --tune_mm_mlp_adapter would train no adapter; drop one of them.")
    if training.lora_enable and model.tune_vit_pos_embedding:
        problems.append("--tune_vit_pos_embedding cannot be saved with --lora_enable; drop one of them.")
    if model.unfreeze_mm_vision_tower and (training.lora_enable or model.tune_mm_mlp_adapter):
        other = "--lora_enable" if training.lora_enable else "--tune_mm_mlp_adapter"
        problems.append(f"--unfreeze_mm_vision_tower cannot be saved with {other}; drop one of them.")
    if data.validates and training.save_strategy == "no" and training.evaluation_strategy == "no":
        problems.append("--save_strategy no disables validation; add --evaluation_strategy steps or epoch.")
    if training.do_eval and not data.validates:
        problems.append("--evaluation_strategy requires --eval_data_path or --validation_fraction.")
    if not data.data_path and not data.meta_path:
        problems.append("--data_path is missing; pass an annotation file, or a mixture with --meta_path.")
    return problems


def make_parser() -> argparse.ArgumentParser:
    """The parser of all training programs; unique prefixes of flags are accepted, as in the published scripts."""
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments), prog="llava train")
    for action in parser._actions:
        if action.type is dict:
            action.type = _json_object
    return parser


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"use_reentrant": false}}, got {text!r}')
    return value


def use_fused_adamw(args: TrainingArguments) -> None:
    """Use fused AdamW instead of the default where possible: same update in one pass, no temporary copies.

    On CUDA the default (foreach) updates all parameters at once through lists of temporaries, several bytes per
    parameter at the peak. DeepSpeed has its own flat partitions. float16 keeps the default: the gradient scaler passes
    overflowing steps on to a fused optimizer, and the learning rate schedule would count them.
    """
    kind = args.device.type
    if args.optim != "adamw_torch" or kind not in ("cuda", "cpu") or args.fp16 or args.deepspeed_plugin is not None:
        return
    args.optim = OptimizerNames.ADAMW_TORCH_FUSED
    if args.process_index == 0:
        logger.info("Using --optim adamw_torch_fused; pass --optim adamw_torch for the unfused optimizer.")


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse and validate a command line; raises one `ConfigError` that names every invalid flag."""
    parsed = make_parser().parse_args(list(argv), argparse.Namespace(optim=None, version=None))
    default_optim, default_version = parsed.optim is None, parsed.version is None  # not on the command line
    if default_optim:
        parsed.optim = TrainingArguments.optim
    if default_version:
        parsed.version = ModelArguments.version
    problems: list[str] = []

    def build(kind: type[T]) -> T | None:
        try:
            return kind(**{f.name: getattr(parsed, f.name) for f in fields(kind) if f.init})  # type: ignore[arg-type]
        except FlagProblems as error:
            problems.extend(error.problems)
            return None

    model, data, training = build(ModelArguments), build(DataArguments), build(TrainingArguments)
    if model and data and training:
        problems += check_combinations(model, data, training)
    _raise(problems)
    assert model and data and training
    model.version_given = not default_version
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
