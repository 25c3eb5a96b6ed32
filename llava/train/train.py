"""Train a chat model: stage 1 (projector) or stage 2 (language model or LoRA, and projector), chosen by the flags.

    python llava/train/train.py --model_name_or_path DIR --vision_tower DIR --data_path FILE --output_dir DIR ...
    torchrun --nproc_per_node 8 llava/train/train.py ... --deepspeed scripts/zero2.json

Rerunning the same command resumes a stopped run from its newest complete checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llava.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.conversation import get_template
from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, make_supervised_data_module
from llava.data.labels import preprocess, preprocess_multimodal
from llava.errors import ConfigError, TrainingError
from llava.files import write_errors
from llava.model.chat_template import set_chat_template
from llava.model.registry import projector_factory
from llava.model.verification import cast_parameters
from llava.placement import avoid_cudnn_attention, limit_onednn_cache
from llava.train import (
    checkpointing,
    estimate,
    hub,
    model_card,
    model_setup,
    optimizer,
    optimizer_state,
    steps,
    validation,
    zero,
)
from llava.train.compat import (
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    maybe_zero_3,
    preprocess_llama_2,
    preprocess_plain,
    preprocess_v1,
    rank0_print,
    safe_save_model_for_hf_trainer,
    smart_tokenizer_and_embedding_resize,
)
from llava.train.dist_utils import any_rank
from llava.train.llava_trainer import LLaVATrainer
from llava.train.model_setup import find_all_linear_names
from llava.train.profiling import memory_history, profiling_callbacks
from llava.train.reporting import LogFiles, isolate_reporters
from llava.train.run_metadata import RunMetadata, check_changes, hardware, read_run, sources, to_json
from llava.train.watchdog import DataCheck, Preempted, Watchdog
from llava.utils import guarded

__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "find_all_linear_names",
    "get_mm_adapter_state_maybe_zero_3",
    "get_peft_state_maybe_zero_3",
    "get_peft_state_non_lora_maybe_zero_3",
    "main",
    "make_supervised_data_module",
    "maybe_zero_3",
    "preprocess",
    "preprocess_llama_2",
    "preprocess_multimodal",
    "preprocess_plain",
    "preprocess_v1",
    "rank0_print",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "train",
]
logger = logging.getLogger("llava.train")  # also when this file is run as a program
ADAM_BYTES = 8  # the two moments of a parameter


def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model ready for its first step, its tokenizer, and the name of the conversation template."""
    if args.deterministic:
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    avoid_cudnn_attention(args.device)
    limit_onednn_cache(args.device)
    set_seed(args.seed)  # all ranks initialize the same projector
    template = model_setup.choose_template(model_args)
    if model_args.vision_tower is not None:
        projector_factory(model_args.mm_projector_type)  # raises for an unknown type, before weights are read
    freeze = model_setup.registered("--freeze_policy", args.freeze_policy, model_setup.FREEZE_POLICIES)
    loss = model_setup.training_loss(args)
    model = model_setup.load_base(model_args, args)
    model.loss_function = loss
    adapted = model_setup.add_lora(model, model_args, args) if args.lora_enable else model
    tokenizer = model_setup.setup_tokenizer(model, model_args, args)
    dtype = model_setup.compute_dtype(args)
    if model_args.vision_tower is not None:
        model_setup.add_vision(model, model_args, data_args, dtype)
        if args.mm_vision_lora_r:
            model_setup.add_tower_lora(adapted, args)
        model.config.freeze_mm_mlp_adapter = args.freeze_mm_mlp_adapter
        model.initialize_vision_tokenizer(model_args, tokenizer)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    freeze(model, model_args, args)
    model_setup.set_precision(model, dtype, deepspeed=bool(args.deepspeed), quantized=args.bits != 16)
    model.config.conv_template = template
    set_chat_template(tokenizer, model.config)
    return adapted, tokenizer, template


def _check_saving(trainer: LLaVATrainer) -> None:
    """Save everything small once, and compare the disk with the size of weights and optimizer state."""
    args = trainer.args
    if not args.should_save:
        return
    output_dir = Path(args.output_dir)
    trainable, total = model_setup.count_parameters(trainer.model)
    # projectors and the like are saved as .bin and as safetensors
    final = (total if trainer.saves == "full" else 2 * trainable) * model_setup.compute_dtype(args).itemsize
    checkpoint = 0 if args.save_strategy == "no" else final + trainable * (ADAM_BYTES + 4)
    checkpointing.dry_run(output_dir, trainer.model, trainer.tokenizer)
    checkpointing.check_disk_space(output_dir, final, checkpoint, args.save_total_limit)


def _find_checkpoint(trainer: LLaVATrainer) -> Path | None:
    """The checkpoint to resume from, checked to fit this run."""
    args = trainer.args
    checkpoint = checkpointing.checkpoint_to_resume(Path(args.output_dir), args.resume_from_checkpoint)
    if checkpoint:
        logger.info("Resuming from %s.", checkpoint)
        checkpointing.check_weights(checkpoint, model_setup.saved_shapes(trainer.model, trainer.saves))
        optimizer_state.check_conversion(checkpoint, args)
        check_changes(checkpoint, args)
    _check_progress(Path(args.output_dir), checkpoint, steps.total_steps(trainer.plan, args))
    return checkpoint


def _check_progress(output_dir: Path, checkpoint: Path | None, total: int) -> None:
    """Raise if a checkpoint is beyond the last of `total` steps; log that a run was finished before."""
    done = checkpointing.global_step(checkpoint) if checkpoint else 0
    if done > total:
        raise ConfigError(
            f"{checkpoint} has done {done} steps, but this run ends after {total}; raise --max_steps or "
            "--num_train_epochs, or use another --output_dir."
        )
    if (before := read_run(output_dir).get("steps")) is not None:
        logger.info(
            "%s holds a finished run of %s steps; this one %s. For a run from the start use another --output_dir.",
            output_dir,
            before,
            f"trains steps {done + 1} to {total}" if done < total else "only writes its final weights again",
        )


def _start_metadata(
    trainer: LLaVATrainer, flags: dict[str, dict[str, object]], checkpoint: Path | None, **facts: object
) -> RunMetadata:
    """Log the plan of the run and write it to `run.json`."""
    args = trainer.args
    trainable, total = model_setup.count_parameters(trainer.model)
    plan, samples = trainer.plan, len(trainer.train_dataset)
    logger.info(
        "Each step takes %d of %d samples, in loss groups of %d; %d processes compute micro-batches of %s; %d steps "
        "per epoch; %.3g of %.3g parameters are trainable.",
        *(plan.global_batch, samples, plan.group, args.world_size),
        f"up to {args.micro_batch_tokens} tokens" if args.micro_batch_tokens else f"{args.train_batch_size} samples",
        *(plan.steps, trainable, total),
    )
    if not args.micro_batch_tokens and (idle := steps.describe_fillers(plan, args.world_size, args.train_batch_size)):
        logger.info(idle)
    config = zero.read_config(args.deepspeed) if args.deepspeed else None
    logger.info(zero.describe_schedule(config, args.max_grad_norm, args.lr_scheduler_type.value))
    metadata = RunMetadata(
        Path(args.output_dir),
        flags,
        deepspeed=config,
        device=str(args.device),
        global_batch=plan.global_batch,
        loss_group=plan.group,
        parameters={"trainable": trainable, "all": total},
        resumed_from=checkpoint and str(checkpoint),
        samples=samples,
        seed=args.seed,
        world_size=args.world_size,
        **facts,
    )
    if args.should_save:
        metadata.warn_about_changes()
        metadata.write()
    return metadata


def run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> LLaVATrainer:
    """Train from start or checkpoint to the final weights in `--output_dir`."""
    refuse_unsupported(args)
    optimizer.check_optimizer(args)
    steps.check_drop_last(data_args, args)
    uploader = hub.open_repository(args)
    output_dir = Path(args.output_dir)
    with write_errors(output_dir):  # before anything is loaded
        output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer, template = prepare(model_args, data_args, args)
    data = make_supervised_data_module(tokenizer, data_args, get_template(template))
    validation.add_validation_set(data, tokenizer, data_args, args, get_template(template))
    if args.deepspeed:
        zero.fill_defaults(args.hf_deepspeed_config.config, model.config.hidden_size)
    trainer = LLaVATrainer(
        model=model,
        tokenizer=tokenizer,
        args=args,
        callbacks=[
            LogFiles(output_dir, plot=args.plot_loss),
            DataCheck(data["train_dataset"].check),
            *profiling_callbacks(args),
            *([uploader] if uploader else []),
        ],
        **data,
    )
    isolate_reporters(trainer, args.report_to or [])
    if trainer.eval_dataset is not None and data_args.eval_generations:
        trainer.add_callback(validation.SampleGenerations(trainer, data_args.eval_generations))
    _check_saving(trainer)
    checkpoint = _find_checkpoint(trainer)
    flags = {"model": to_json(model_args), "data": to_json(data_args), "training": to_json(args)}
    data_bytes = Path(data_args.data_path or data_args.meta_path or "").stat().st_size
    facts = {"hardware": hardware(args), "sources": sources(model_args)}
    metadata = _start_metadata(trainer, flags, checkpoint, template=template, data_bytes=data_bytes, **facts)
    result = train_with_watchdog(trainer, checkpoint)
    finish(trainer, model_setup.compute_dtype(args))
    faults = trainer.train_dataset.report(functools.partial(any_rank, device=args.device))
    if any(faults.values()):
        logger.info(
            "Records: %d bad and replaced, %d truncated to --model_max_length %d, %d without a token to learn.",
            *(faults["bad"], faults["truncated"], args.model_max_length, faults["unsupervised"]),
        )
    if args.should_save:
        metadata.write(
            steps=result.global_step,
            train_loss=result.training_loss,
            seconds=result.metrics["train_runtime"],
            data=faults,
        )
        model_card.try_to_write_card(output_dir, uploader and uploader.name)
    return trainer


def train_with_watchdog(trainer: LLaVATrainer, checkpoint: Path | None) -> transformers.trainer_utils.TrainOutput:
    """Train; end the process if no step finishes within `--step_timeout`, and save before it ends by a signal."""
    trainer.add_callback(trainer.preemption)
    watchdog = Watchdog(trainer.args.step_timeout, trainer.args.process_index)
    if trainer.args.step_timeout:
        trainer.add_callback(watchdog)
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        watchdog.stop()
        trainer.preemption.restore()


def finish(trainer: LLaVATrainer, dtype: torch.dtype) -> None:
    """Write trainer state and final weights to the output directory, full weights in `dtype` as published."""
    trainer.save_state()
    trainer.model.config.use_cache = True
    if not trainer.is_deepspeed_enabled and trainer.saves == "full":
        cast_parameters(trainer.model, dtype)
    trainer.save_model()
    logger.info("Saved to %s.", trainer.args.output_dir)


def refuse_unsupported(args: TrainingArguments) -> None:
    """Raise `ConfigError` for valid flags that cannot be combined, on this machine or with the ZeRO file."""
    if args.deepspeed:
        zero.check_batch_sizes(args)
    if args.bits != 16 and args.deepspeed and args.hf_deepspeed_config.is_zero3():
        raise ConfigError(
            f"--bits {args.bits} does not work with ZeRO stage 3, which cannot partition quantized weights; use "
            "scripts/zero2.json, or --bits 16."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"One process sees {args.n_gpu} GPUs; start one process per GPU (torchrun --nproc_per_node {args.n_gpu}) "
            "or set CUDA_VISIBLE_DEVICES to one of them."
        )


def train(argv: Sequence[str] | None = None, attn_implementation: str | None = None) -> None:
    """Parse `argv` (default: the command line) and train; raises errors, for callers in Python.

    `attn_implementation`, as published, overrides the default of the flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if attn_implementation is not None:
        argv = ["--attn_implementation", attn_implementation, *argv]
    model_args, data_args, args = parse_arguments(argv)
    logging.getLogger("llava").setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    try:
        with memory_history(args):
            trainer = run(model_args, data_args, args)
    except torch.cuda.OutOfMemoryError as error:
        advice = estimate.out_of_memory_advice(model_args, data_args, args)
        raise TrainingError(f"The GPU is out of memory. {advice}") from error
    if args.push_to_hub:
        leave_process_group()  # the other ranks would wait for the upload no longer than --ddp_timeout
        uploader = trainer.pop_callback(hub.HubUploader)
        if uploader is not None:
            uploader.finish()


def leave_process_group() -> None:
    """Wait for all ranks, then destroy the process group.

    Exiting while another rank saves, or with the group's threads running, aborts.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point: `train`, with one-line errors and exit status 2, or 128 + N after signal N."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other; tests see them all
    status = 0
    try:
        train(argv)
    except Preempted as end:
        status = int(end.code or 0)
    leave_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
