"""Train a chat model: stage 1 (projector), stage 2 (all, or LoRA), by the flags (spec/train.md §8).

    python llava/train/train.py --model_name_or_path DIR --vision_tower DIR --data_path FILE --output_dir DIR ...
    torchrun --nproc_per_node 8 llava/train/train.py ... --deepspeed scripts/zero2.json

Started again with the same command, a stopped run goes on from its newest complete checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed

from llava.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.conversation import get_template
from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, make_supervised_data_module
from llava.data.labels import preprocess, preprocess_multimodal
from llava.data.mixture import make_mixture_module
from llava.errors import ConfigError, TrainingError
from llava.files import write_errors
from llava.placement import avoid_cudnn_attention
from llava.train import checkpointing, estimate, model_setup, reporting, validation, zero
from llava.train.dist_utils import any_rank
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run_metadata import RunFiles, RunMetadata, plain
from llava.train.watchdog import DataWatch, Watchdog
from llava.utils import guarded

__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "main",
    "make_supervised_data_module",
    "preprocess",
    "preprocess_multimodal",
    "train",
]
logger = logging.getLogger("llava.train")  # also when this file is run as a program
BYTES_OF_ADAM = 8


def prepare(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> tuple[Any, Any, str]:
    """Model and tokenizer as the first step finds them, and the name of the template (spec/train.md §8, 2 to 9)."""
    if args.deterministic:
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    avoid_cudnn_attention(args.device)
    set_seed(args.seed)  # every rank draws the same projector
    template = model_setup.template_name(model_args.version)
    model: Any = model_setup.load_base(model_args, args)
    adapted = model_setup.wrap(model, model_args, args) if args.lora_enable else model
    tokenizer = model_setup.load_training_tokenizer(model_args, args)
    model_setup.set_pad_token(model, tokenizer, model_args.version, may_grow=not args.lora_enable)
    dtype = model_setup.compute_dtype(args)
    if model_args.vision_tower is not None:
        model_setup.add_vision(model, model_args, data_args, dtype)
        model.config.freeze_mm_mlp_adapter = args.freeze_mm_mlp_adapter
        model.initialize_vision_tokenizer(model_args, tokenizer)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    model_setup.set_trainable(model, model_args, args)
    model_setup.set_precision(model, dtype, engine=bool(args.deepspeed), packed=args.bits != 16)
    model.config.conv_template = template
    checkpointing.sanitise_generation_config(model)
    return adapted, tokenizer, template


def _check_saving(model: Any, tokenizer: Any, model_args: ModelArguments, args: TrainingArguments) -> None:
    if not args.should_save:
        return
    output_dir = Path(args.output_dir)
    learning, total = model_setup.count(model)
    width = model_setup.compute_dtype(args).itemsize
    final = (learning if model_args.tune_mm_mlp_adapter or args.lora_enable else total) * width
    checkpoint = 0 if args.save_strategy == "no" else final + learning * (BYTES_OF_ADAM + 4)
    checkpointing.dry_run(output_dir, model, tokenizer)
    checkpointing.check_room(output_dir, final, checkpoint, args.save_total_limit)


def _start_record(trainer: LLaVATrainer, groups: dict[str, Any], **facts: Any) -> RunMetadata:
    """Say in the log, and keep in run.json, what is about to happen."""
    args = trainer.args
    learning, total = model_setup.count(trainer.model)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    samples = len(trainer.train_dataset)
    logger.info(
        "Global batch %d = %d a device x %d accumulated x %d processes; %d samples; %.3g of %.3g parameters learn.",
        global_batch, args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size,
        samples, learning, total,
    )  # fmt: skip
    config = zero.read_config(args.deepspeed) if args.deepspeed else None
    logger.info(zero.describe(config, args.max_grad_norm, args.lr_scheduler_type.value))
    record = RunMetadata(
        Path(args.output_dir) / "run.json",
        {
            "arguments": {name: plain(group) for name, group in groups.items()},
            "deepspeed": config,
            "device": str(args.device),
            "global_batch": global_batch,
            "parameters": {"trainable": learning, "all": total},
            "samples": samples,
            "seed": args.seed,
            "world_size": args.world_size,
            **facts,
        },
    )
    if args.should_save:
        record.compare()
        record.write()
    return record


def run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> LLaVATrainer:
    """The whole run; everything it leaves is under `--output_dir`."""
    refuse_unsupported(args)
    with write_errors(Path(args.output_dir)):  # before anything is loaded for it
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    model, tokenizer, template = prepare(model_args, data_args, args)
    make_data = make_mixture_module if data_args.meta_path else make_supervised_data_module
    data = make_data(tokenizer, data_args, get_template(template))
    validation.add(data, tokenizer, data_args, args, get_template(template))
    if args.deepspeed:
        zero.settle(args.hf_deepspeed_config.config, model.config.hidden_size)
    trainer = LLaVATrainer(
        model=model,
        tokenizer=tokenizer,
        args=args,
        saves="projector" if model_args.tune_mm_mlp_adapter else "lora" if args.lora_enable else "full",
        callbacks=[RunFiles(Path(args.output_dir), plot=args.plot_loss), DataWatch(data["train_dataset"].check)],
        **data,
    )
    reporting.guard(trainer, args.report_to or [])
    if trainer.eval_dataset is not None and data_args.eval_generations:
        trainer.add_callback(validation.Answers(trainer, data_args.eval_generations))
    _check_saving(model, tokenizer, model_args, args)
    checkpoint = checkpointing.resume_from(Path(args.output_dir), args.resume_from_checkpoint)
    if checkpoint:
        logger.info("Going on from %s.", checkpoint)
        checkpointing.check_fits(checkpoint, trainer.expected_shapes())
        zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
        checkpointing.check_optimizer(
            checkpoint, engine=trainer.is_deepspeed_enabled, zero3=zero3, processes=args.world_size
        )
    groups = {"model": model_args, "data": data_args, "training": args}
    size = Path(data_args.data_path or data_args.meta_path or "").stat().st_size
    facts = {"template": template, "data_bytes": size, "resumed_from": checkpoint and str(checkpoint)}
    record = _start_record(trainer, groups, **facts)
    result = watched(trainer, checkpoint)
    finish(trainer, model_setup.compute_dtype(args))
    faults = trainer.train_dataset.report(functools.partial(any_rank, device=args.device))
    if args.should_save:
        record.write(
            steps=result.global_step,
            train_loss=result.training_loss,
            seconds=result.metrics["train_runtime"],
            data=faults,
        )
    return trainer


def watched(trainer: LLaVATrainer, checkpoint: Path | None) -> Any:
    """Train, with an eye on steps that do not end."""
    dog = Watchdog(trainer.args.step_timeout, trainer.args.process_index)
    if trainer.args.step_timeout:
        trainer.add_callback(dog)
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        dog.stop()


def finish(trainer: LLaVATrainer, dtype: torch.dtype) -> None:
    """Write trainer state and final weights to the output directory."""
    trainer.save_state()
    trainer.model.config.use_cache = True
    if not trainer.is_deepspeed_enabled and trainer.saves == "full":
        model_setup.as_saved(trainer.model, dtype)
    trainer.save_model()
    logger.info("Saved to %s.", trainer.args.output_dir)


def refuse_unsupported(args: TrainingArguments) -> None:
    """Flags that parse, but that this version would not honour."""
    if args.bits != 16 and args.deepspeed and args.hf_deepspeed_config.is_zero3():
        raise ConfigError(
            f"--bits {args.bits} cannot be shared out by ZeRO stage 3; use scripts/zero2.json, or --bits 16."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"One process sees {args.n_gpu} GPUs; start one process a GPU (torchrun --nproc_per_node {args.n_gpu}) or "
            "set CUDA_VISIBLE_DEVICES to one of them."
        )


def train(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (default: the command line) and run; errors are raised, for callers in Python."""
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.getLogger("llava").setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    try:
        run(model_args, data_args, args)
    except torch.cuda.OutOfMemoryError as error:
        advice = estimate.advice(model_args, data_args, args, gpus=args.world_size)
        raise TrainingError(f"The GPU is out of memory. {advice}") from error


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Console entry: `train`, with a one-line error and exit status 2 if it cannot be done."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other; tests see them all
    train(argv)
    if torch.distributed.is_initialized():
        # leaving while another rank still saves, or with the group's threads running, ends in an abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
