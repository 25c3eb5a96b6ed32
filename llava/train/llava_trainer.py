"""`LLaVATrainer`: the transformers Trainer with exact resuming, token counts, and small, verified checkpoints.

The order of samples depends on seed and epoch alone, training stops at the first non-finite loss or gradient norm, and
checkpoints appear atomically.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llava.data.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava.errors import CheckpointError, TrainingError
from llava.train import checkpointing, optimizer, optimizer_state, validation, zero
from llava.train.model_setup import save_format, saved_shapes
from llava.train.packing import Packer
from llava.train.reporting import Console
from llava.train.steps import (
    COUNTS,
    NO_GROUP,
    Dealer,
    LoadedStep,
    MicroBatch,
    Step,
    StepDataset,
    StepPlan,
    StepSampler,
    count_step,
    deal_in_order,
    record_sampler,
    row_weights,
    sum_over_ranks,
    tokens_of_groups,
)
from llava.train.throughput import ThroughputMeter, format_duration, peak_memory
from llava.train.watchdog import Preempted, PreemptionHandler, start_loader_worker

__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]
logger = logging.getLogger(__name__)
EPOCH_STRIDE: Final = 1_000_003


class _EpochStart(transformers.TrainerCallback):
    """Seeds the order of each epoch; on resume, restores the summed loss so that the mean covers all steps."""

    def __init__(self, trainer: LLaVATrainer):
        self.trainer = trainer

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.trainer._total_loss_scalar = summed_loss(state.log_history, state.global_step)

    def on_epoch_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.trainer.begin_epoch()


def summed_loss(history: Sequence[Mapping[str, float]], steps: int) -> float:
    """Sum of the losses of the first `steps` steps, restored from the logged means."""
    total, loss, logged = 0.0, 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            loss = entry["loss"]
            total += loss * (entry["step"] - logged)
            logged = entry["step"]
    return total + loss * (steps - logged)


class LLaVATrainer(transformers.Trainer):
    """Trainer of a chat model; `saves` is the content of its checkpoints: "full", "projector" or "lora"."""

    optimizer: Any
    control: TrainerControl

    def __init__(self, *args: Any, **kwargs: Any):
        self._order = torch.Generator()
        self._step: list[MicroBatch] = []  # of the current step
        self._last_log: float | None = None
        self._reset_counts()
        self._grad_norm: float | None = None
        self._engine: Any = None
        self._own_rates: dict[str, int] = {}  # flag -> parameter group
        self._group_names: list[list[str]] = []
        self._meter: ThroughputMeter | None = None
        self._first_log: tuple[int, float] | None = None
        self.preemption = PreemptionHandler()
        super().__init__(*args, **kwargs)
        self.label_smoother = None  # the model's loss smooths labels
        self.saves = save_format(self.model)
        self.console = Console()
        for kind in (transformers.trainer_callback.PrinterCallback, transformers.trainer.DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(kind)
        for callback in (_EpochStart(self), self.console):
            self.add_callback(callback)

    def init_hf_repo(self) -> None:
        """Nothing: `llava.train.hub` opens the repository before weights are loaded."""

    def train(self, *args: Any, **kwargs: Any) -> transformers.trainer_utils.TrainOutput:
        try:
            # transformers gives its function no way to load a checkpoint of other hardware
            with mock.patch.object(transformers.trainer, "deepspeed_load_checkpoint", self._load_engine):
                return super().train(*args, **kwargs)
        except Preempted:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes the reporters
            raise
        finally:
            self.console.close()

    @functools.cached_property
    def plan(self) -> StepPlan:
        """The optimizer steps of an epoch of the training set."""
        return StepPlan.of(len(self.train_dataset), self.args)

    # --- order of samples ---------------------------------------------------------------------------------------

    def _get_train_sampler(self) -> Sampler[int]:
        args, lengths = self.args, None
        if args.group_by_modality_length:
            lengths = self.train_dataset.modality_lengths
        elif args.group_by_length:
            lengths = self.train_dataset.lengths
        return record_sampler(self.plan, self._order, lengths, by_modality=args.group_by_modality_length)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """Loader of the steps of this rank, each a list of micro-batches on the CPU."""
        args = self.args
        deal: Dealer = functools.partial(deal_in_order, ranks=args.world_size, batch_size=args.train_batch_size)
        if args.micro_batch_tokens:
            deal = Packer.of(self.train_dataset, self.model, args.world_size, args.micro_batch_tokens).deal
        self._sampler = StepSampler(self._get_train_sampler(), self.plan, deal, args.process_index)
        return DataLoader(
            StepDataset(self.train_dataset, self.data_collator),  # type: ignore[arg-type]
            batch_sampler=self._sampler,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            worker_init_fn=start_loader_worker,
        )

    def begin_epoch(self) -> None:
        """Seed the order of an epoch, also of the first one after a resume."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        epoch, self._sampler.done = divmod(self.state.global_step, self.plan.steps)
        self._order.manual_seed(seed + EPOCH_STRIDE * epoch)
        self._last_log = self._last_log or time.perf_counter()

    def _samples(self, micro_batches: Iterable[MicroBatch]) -> list[int]:
        """Data set indices of the records of micro-batches."""
        original = getattr(self.train_dataset, "original", int)  # of a subset: the index in the full data set
        return [original(record) for micro_batch in micro_batches for record in micro_batch.records]

    # --- one step -----------------------------------------------------------------------------------------------

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[object]:
        """bfloat16 autocast on the CPU with float32 masters; on CUDA accelerate wraps the forward itself."""
        if self.use_cpu_amp:
            return torch.autocast("cpu", dtype=self.amp_dtype, cache_enabled=cache_enabled)
        return nullcontext()

    def create_optimizer(self) -> torch.optim.Optimizer:
        rates = optimizer.own_rates(self.args)
        if self.optimizer is None and rates:
            decayed = self.get_decay_parameter_names(self.model)
            groups = optimizer.parameter_groups(
                self.model.named_parameters(), decayed, self.args.weight_decay, self.args.learning_rate, rates
            )
            logger.info("%s.", optimizer.describe_rates(self.args.learning_rate, rates))
            self._own_rates = optimizer.logged_groups(groups)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **settings)
        created: torch.optim.Optimizer = super().create_optimizer()
        optimizer.keep_embeddings_in_32_bit(self.model, created)
        # The optimizer of a ZeRO file is created by DeepSpeed, with one group.
        self._group_names = optimizer.group_names(getattr(created, "param_groups", []), self.model)
        return created

    def training_step(self, model: nn.Module, step: LoadedStep) -> Tensor:
        """Forward and backward passes over the micro-batches of a step; returns this rank's part of its loss.

        The mean of the parts over all ranks is the loss of the step. Raises `TrainingError` before the last backward
        pass, after which DeepSpeed updates the weights, if it is not finite.
        """
        model.train()
        self._step = [micro_batch for micro_batch, _ in step]
        groups = self.plan.groups(self.state.global_step % self.plan.steps)
        tokens = tokens_of_groups(step, groups)
        if self._groups_are_split:
            tokens = sum_over_ranks(tokens, self.args.device)
        weights = row_weights(step, tokens, groups, self.args.world_size)
        self._count(step, tokens)
        losses: list[Tensor] = []
        for (_, batch), weight in zip(step, weights):
            is_last = len(losses) == len(step) - 1
            with self._accumulating(model, is_last), record_function(f"micro-batch {len(losses)}"):
                inputs = self._prepare_inputs(batch)  # casts floats for DeepSpeed, unlike the weights
                with self.compute_loss_context_manager():
                    loss = model(**inputs, row_weights=weight.to(self.args.device, non_blocking=True))["loss"]
                losses.append(loss.detach())
                if is_last:
                    self.preemption.share(self.args)
                    self._check_losses(torch.stack(losses))
                self.accelerator.backward(loss)
            if not is_last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return torch.stack(losses).sum()

    @functools.cached_property
    def _groups_are_split(self) -> bool:
        """Whether records of one loss group can be on several ranks."""
        args = self.args
        return bool(args.world_size > 1 and (args.micro_batch_tokens or args.train_batch_size % self.plan.group))

    def _accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager[object]:
        """Context of a micro-batch; gradients are exchanged and, by DeepSpeed, applied in the last one of a step.

        ZeRO 2 and 3 partition gradients after each micro-batch.
        """
        if self.is_deepspeed_enabled:
            model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        elif not is_last:
            no_sync: AbstractContextManager[object] = self.accelerator.no_sync(model)
            return no_sync
        return nullcontext()

    def _check_losses(self, losses: Tensor) -> None:
        if bool(torch.isfinite(losses.sum())):
            return
        index, loss = next((i, loss) for i, loss in enumerate(losses.tolist()) if not math.isfinite(loss))
        raise TrainingError(
            f"The loss is {loss} at step {self.state.global_step + 1}, rank {self.args.process_index}, samples "
            f"{self._samples(self._step[index : index + 1])} of the data set; the step was not taken. Inspect these "
            "samples, lower --learning_rate, or train with --bf16 instead of --fp16."
        )

    def floating_point_ops(self, inputs: LoadedStep) -> int:
        return sum(super(LLaVATrainer, self).floating_point_ops(batch) for _, batch in inputs)

    def create_accelerator_and_postprocess(self) -> None:
        with warnings.catch_warnings():
            # transformers 4.36.2 passes arguments that accelerate has renamed
            warnings.filterwarnings("ignore", "Passing the following arguments to `Accelerator`", FutureWarning)
            super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_and_check(*args: object, **kwargs: object) -> Tensor | None:
            norm: Tensor | None = clip(*args, **kwargs)
            self._check_grad_norm(norm)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_check

    def _check_grad_norm(self, norm: Tensor | float | None) -> None:
        if norm is None and self._engine is not None:
            norm = self._engine.get_global_grad_norm()
        self._grad_norm = None if norm is None else float(norm)
        # float16 overflows are expected: the gradient scaler skips such a step
        if self._grad_norm is not None and not math.isfinite(self._grad_norm) and not self.args.fp16:
            raise TrainingError(
                f"The gradient norm is {self._grad_norm} at step {self.state.global_step + 1}, of this rank's "
                f"samples {self._samples(self._step)}; inspect these samples or lower --learning_rate."
            )

    def _count(self, step: LoadedStep, tokens_of_groups: Tensor) -> None:
        """Add a step to the counts since the last log step, without a synchronization.

        Groups without a supervised token are counted by one of the ranks that share them.
        """
        self._counts.update(count_step(step, getattr(self.model, "num_image_tokens", 0)))
        if self._groups_are_split:
            own = tokens_of_groups[self.args.process_index :: self.args.world_size]
        else:
            own = tokens_of_groups[
                sorted({group for micro_batch, _ in step for group in micro_batch.groups} - {NO_GROUP})
            ]
        self._unsupervised += (own == 0).sum()

    def _reset_counts(self) -> None:
        self._counts: Counter[str] = Counter()
        self._unsupervised: Tensor | int = 0

    def log(self, logs: dict[str, float]) -> None:
        """Add supervised tokens, gradient norm, throughput and peak memory since the last log step, over all ranks."""
        if "loss" in logs and self._last_log is not None:
            seconds = time.perf_counter() - self._last_log
            local = [*map(self._counts.__getitem__, COUNTS), peak_memory(self.args.device)]
            counts = torch.tensor(local, device=self.args.device)
            unsupervised = counts.new_zeros(1) + self._unsupervised
            by_rank = self._nested_gather(torch.cat([counts, unsupervised]).unsqueeze(0))  # (ranks, 6)
            *totals, unsupervised_groups = by_rank.sum(0).tolist()
            counted = {name: float(total) for name, total in zip(COUNTS, totals)}
            logs["supervised_tokens"] = int(counted["supervised"])
            if unsupervised_groups:
                logs["unsupervised_groups"] = unsupervised_groups
            rates = self.lr_scheduler.get_last_lr() if self._own_rates else []
            logs.update({flag: rates[index] for flag, index in self._own_rates.items()})
            if self._grad_norm is not None:
                logs["grad_norm"] = round(self._grad_norm, 4)
            logs.update(self._speed(seconds, counted))
            logs["memory_gib"] = round(int(by_rank[:, -2].max()) / 2**30, 2)
            self._reset_counts()
            self._last_log = time.perf_counter()
        super().log(logs)

    def _speed(self, seconds: float, counted: Mapping[str, float]) -> dict[str, Any]:
        """Throughput of the last log interval, and the time left at the mean speed since the first log step."""
        self._meter = self._meter or ThroughputMeter.of(self.model, self.args)
        step, now = self.state.global_step, time.perf_counter()
        self._first_log = self._first_log or (step, now)
        first, since = self._first_log
        speed: dict[str, Any] = self._meter.metrics(seconds=seconds, **counted)
        if step > first:
            left = (now - since) / (step - first) * (self.state.max_steps - step)
            speed["time_left"] = format_duration(left)
        return speed

    # --- saving and resuming ------------------------------------------------------------------------------------

    @property
    def deepspeed(self) -> Any:
        """The DeepSpeed engine; transformers sets it right before it loads or saves an engine checkpoint."""
        return self._engine

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self._engine = engine
        if engine is not None and not isinstance(engine.save_checkpoint, functools.partial):
            # Frozen weights are not part of the training state: a resumed run loads them from the base model.
            engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
            engine.load_checkpoint = functools.partial(engine.load_checkpoint, load_module_strict=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model in the format of `saves`; all ranks must call (ZeRO-3 gathers), global rank 0 writes."""
        directory = Path(output_dir or self.args.output_dir)
        is_writer = bool(self.args.should_save)
        if self.saves == "projector":
            checkpointing.save_projector(self.model, directory, final=not _internal_call, is_writer=is_writer)
        elif self.saves == "lora":
            checkpointing.save_lora(self.model, self.tokenizer, directory, is_writer=is_writer)
        elif self.is_deepspeed_enabled:
            state = zero.full_state_dict(self.model, is_writer=is_writer)
            if is_writer:
                self._save(str(directory), state_dict=state)
        elif is_writer:
            self._save(str(directory))

    def _save_checkpoint(self, model: nn.Module, trial: object, metrics: Mapping[str, float] | None = None) -> None:
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        staging = final.with_name(f"tmp-{final.name}")
        self.store_flos()
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_rng_state(str(staging))
        self.accelerator.wait_for_everyone()
        validation.track_best_checkpoint(self.state, metrics, final)
        if self.args.should_save:
            self.state.save_to_json(str(staging / checkpointing.STATE_FILE))
            checkpointing.verify(staging, saved_shapes(self.model, self.saves))
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._rotate_checkpoints(use_mtime=False, output_dir=self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        if self.saves == "projector":
            checkpointing.load_projector(model or self.model, Path(resume_from_checkpoint))
        elif self.saves == "lora":
            checkpointing.load_lora(model or self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint after the last step, for `--load_best_model_at_end`."""
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
        logger.info("Loading the best checkpoint: %s, validation loss %.4g.", best, self.state.best_metric)
        self.state.best_model_checkpoint = str(best)
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))

    def _rng_file(self, directory: str) -> Path:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(directory) / f"rng_state{rank}.pth"

    def _save_rng_state(self, output_dir: str) -> None:
        torch.save(checkpointing.random_state(), self._rng_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state of this rank, or that of rank 0 if it was saved by fewer ranks."""
        if checkpoint is None:
            return
        others = sorted(Path(checkpoint).glob("rng_state*.pth"))  # rank 0 is the first; nodes can have their own disks
        file = next((file for file in [self._rng_file(checkpoint), *others] if file.is_file()), None)
        if file is None:
            raise CheckpointError(f"{checkpoint} holds no random state; resume from a complete checkpoint-N.")
        checkpointing.set_random_state(checkpointing.load_state(file, "random state"))

    def _load_engine(self, engine: Any, checkpoint: str) -> None:
        """Load a checkpoint into the DeepSpeed engine, in place of the function of transformers."""
        layout = optimizer_state.layout_of_engine(engine, self.args.world_size)
        if layout.loads(optimizer_state.layout_of(Path(checkpoint))):
            deepspeed_load_checkpoint(engine, checkpoint)
        else:
            optimizer_state.to_engine(self._convert(checkpoint, layout), engine)

    def _convert(self, checkpoint: str, layout: optimizer_state.Layout) -> optimizer_state.SavedState:
        return optimizer_state.convert(Path(checkpoint), layout, self.model, self.saves, self._group_names)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.accelerator.scaler is not None:
            torch.save(self.accelerator.scaler.state_dict(), Path(output_dir, optimizer_state.SCALER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        layout, scaler = optimizer_state.Layout(None, self.args.world_size), self.accelerator.scaler
        targets = [(self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)]
        if not layout.loads(optimizer_state.layout_of(Path(checkpoint))):
            saved = self._convert(checkpoint, layout)
            optimizer_state.to_optimizer(saved, targets.pop(0)[0].optimizer)
            if scaler is not None and saved.loss_scale is not None:
                scaler.load_state_dict({**scaler.state_dict(), "scale": saved.loss_scale})
        elif scaler is not None and Path(checkpoint, optimizer_state.SCALER).is_file():
            targets.append((scaler, optimizer_state.SCALER))
        for target, name in targets:
            file = Path(checkpoint, name)
            # A mapped file costs no memory, but states on the CPU would stay in it.
            state = checkpointing.load_state(file, "optimizer state", mmap=self.args.device.type != "cpu")
            try:
                if target is self.optimizer:
                    optimizer_state.keep_kernels(state, target)
                target.load_state_dict(state)
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{file} is from a run with another optimizer: {error}; use its flags."
                ) from error
