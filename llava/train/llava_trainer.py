"""The trainer: transformers' own with an order of samples that a resume reproduces, counts of supervised tokens, a stop
at the first loss that is not finite, and checkpoints that are small, verified and atomic (spec/train.md §6, §10)."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.dataset import start_worker
from llava.data.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava.errors import TrainingError
from llava.model.checkpoint import PROJECTOR_FILE, load_bin
from llava.train import checkpointing, model_setup, throughput, validation, weights, zero

__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]
logger = logging.getLogger(__name__)
EPOCH_STRIDE = 1_000_003
Saves = Literal["full", "projector", "lora"]


class DropIncompleteAccumulation(BatchSampler):
    """Batches up to the last whole optimizer step of an epoch.

    With gradient accumulation the library carries a rest over into the next epoch, and no resume can know of it.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, accumulation: int, world_size: int):
        super().__init__(sampler, batch_size, drop_last)
        self.accumulation, self.world_size = accumulation, world_size

    def __len__(self) -> int:
        total = super().__len__()
        steps = math.ceil(total / self.world_size) // self.accumulation
        return min(total, steps * self.accumulation * self.world_size) or total

    def __iter__(self) -> Iterator[list[int]]:
        batches = super().__iter__()
        for _ in range(len(self)):
            batch = next(batches, None)
            if batch is None:
                return
            yield batch


class _EpochOrder(transformers.TrainerCallback):
    """Seeds the order of each epoch from seed and epoch alone; a resumed run's mean loss is that of all its steps."""

    def __init__(self, trainer: LLaVATrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._total_loss_scalar = logged_loss(state.log_history, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.trainer.begin_epoch(len(train_dataloader))


def logged_loss(history: Sequence[Mapping[str, Any]], steps: int) -> float:
    """The sum of the losses of so many steps, of which means are logged."""
    total, before, loss = 0.0, 0, 0.0
    for entry in history:
        if "loss" in entry:
            loss = entry["loss"]
            total += loss * (entry["step"] - before)
            before = entry["step"]
    return total + loss * (steps - before)


class LLaVATrainer(transformers.Trainer):
    """`saves` says what a checkpoint holds: the model, its projector, or adapters and what goes with them."""

    def __init__(self, *args: Any, saves: Saves = "full", **kwargs: Any):
        self.saves = saves
        self._order = torch.Generator()
        self._epoch = self._batch = 0
        self._clock: float | None = None
        self._counts: torch.Tensor | None = None
        self._grad_norm: float | None = None
        self._engine: Any = None
        self._pace: throughput.Pace | None = None
        self._begun: tuple[int, float] | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_EpochOrder(self))

    # --- order of samples ---------------------------------------------------------------------------------------

    def _get_train_sampler(self) -> Sampler[int]:
        args = self.args
        if args.group_by_modality_length or args.group_by_length:
            lengths = (
                self.train_dataset.modality_lengths if args.group_by_modality_length else self.train_dataset.lengths
            )
            return LengthGroupedSampler(
                args.train_batch_size,
                world_size=args.world_size,
                lengths=lengths,
                generator=self._order,
                group_by_modality=args.group_by_modality_length,
            )
        return RandomSampler(self.train_dataset, generator=self._order)

    def get_train_dataloader(self) -> DataLoader[Any]:
        args = self.args
        batches = DropIncompleteAccumulation(
            self._get_train_sampler(),
            self._train_batch_size,
            args.dataloader_drop_last,
            args.gradient_accumulation_steps,
            args.world_size,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            worker_init_fn=start_worker,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def begin_epoch(self, batches: int) -> None:
        """Called before an epoch is dealt, also the first one after a resume; `batches` is its length on this rank."""
        steps = max(1, batches // self.args.gradient_accumulation_steps)
        self._epoch, done = divmod(self.state.global_step, steps)
        self._batch = done * self.args.gradient_accumulation_steps
        self._seed_order()
        self._clock = self._clock or time.perf_counter()

    def _seed_order(self) -> None:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order.manual_seed(seed + EPOCH_STRIDE * self._epoch)

    def current_samples(self) -> list[int]:
        """Indices in the data set of the batch now being trained on by this rank, dealt again to find them."""
        self._seed_order()
        batches: Any = self.callback_handler.train_dataloader.batch_sampler
        dealt: list[int] = next((batch for index, batch in enumerate(batches) if index == self._batch - 1), [])
        original = getattr(self.train_dataset, "original", int)  # of a part of the data, the places in the whole
        return [original(index) for index in dealt]

    # --- one step -----------------------------------------------------------------------------------------------

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """bfloat16 products on the CPU with float32 masters; on CUDA accelerate wraps the forward itself."""
        if self.use_cpu_amp:
            return torch.autocast("cpu", dtype=self.amp_dtype, cache_enabled=cache_enabled)
        return nullcontext()

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """The model's loss; raises `TrainingError` before the backward pass if it is not finite."""
        if model.training:
            self._count(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training and not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"The loss is {loss.detach().item()} at step {self.state.global_step + 1}, "
                f"rank {self.args.process_index}, samples {self.current_samples()} of the data set; "
                "nothing was learned from it. Look at these samples, "
                "lower --learning_rate, or train with --bf16 instead of --fp16."
            )
        return (loss, outputs) if return_outputs else loss

    def create_accelerator_and_postprocess(self) -> None:
        with warnings.catch_warnings():
            # the pinned library still passes arguments that accelerate has renamed
            warnings.filterwarnings("ignore", "Passing the following arguments to `Accelerator`", FutureWarning)
            super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_and_check(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            self._check_grad_norm(norm)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_check

    def _check_grad_norm(self, norm: Any) -> None:
        if norm is None and self._engine is not None:
            norm = self._engine.get_global_grad_norm()
        self._grad_norm = None if norm is None else float(norm)
        # float16 meets overflows by design: its scaler skips such a step
        if self._grad_norm is not None and not math.isfinite(self._grad_norm) and not self.args.fp16:
            raise TrainingError(
                f"The gradient norm is {self._grad_norm} at step {self.state.global_step + 1}, in the batch with "
                f"samples {self.current_samples()}; look at these samples or lower --learning_rate."
            )

    def _count(self, inputs: dict[str, Any]) -> None:
        labels, ids = inputs["labels"], inputs["input_ids"]
        mask = inputs.get("attention_mask")
        supervised = (labels[:, 1:] != IGNORE_INDEX).sum()
        tokens = ids.new_full((), ids.numel()) if mask is None else mask.sum()
        images = tokens.new_full((), len(inputs.get("images", ())))  # filled on the device: no synchronisation
        if image_tokens := getattr(self.model, "num_image_tokens", 0):
            tokens = tokens + (ids == IMAGE_TOKEN_INDEX).sum() * (image_tokens - 1)
        # int64 is exact, and MPS has no float64
        samples = tokens.new_full((), len(ids))
        counts = torch.stack([tokens, supervised, samples, (supervised == 0).long(), images])
        self._counts = counts if self._counts is None else self._counts + counts
        self._batch += 1

    def log(self, logs: dict[str, float]) -> None:
        """Adds what was trained on since the last line, over all ranks: supervised tokens, and speed."""
        if "loss" in logs and self._counts is not None and self._clock is not None:
            seconds = time.perf_counter() - self._clock
            total = self._nested_gather(self._counts.unsqueeze(0)).sum(0).tolist()
            tokens, supervised, samples, unsupervised, images = map(float, total)
            logs["supervised_tokens"] = int(supervised)
            if unsupervised:
                logs["unsupervised_batches"] = int(unsupervised)
            if self._grad_norm is not None:
                logs["grad_norm"] = round(self._grad_norm, 4)
            counted = {"tokens": tokens, "samples": samples, "supervised": supervised, "images": images}
            logs.update(self._speed(seconds, counted))
            self._counts, self._clock = None, time.perf_counter()
        super().log(logs)

    def _speed(self, seconds: float, counted: dict[str, float]) -> dict[str, Any]:
        """Tokens and samples a second, MFU on known devices, and the time left at the pace since the start."""
        self._pace = self._pace or throughput.pace_of(self.model, self.args)
        step, now = self.state.global_step, time.perf_counter()
        begun, since = self._begun or (step, now)
        self._begun = (begun, since)
        speed: dict[str, Any] = self._pace.line(seconds=seconds, **counted)
        if step > begun:
            left = (now - since) / (step - begun) * (self.state.max_steps - step)
            speed["time_left"] = throughput.hours_and_minutes(left)
        return speed

    # --- saving and resuming ------------------------------------------------------------------------------------

    @property
    def deepspeed(self) -> Any:
        """The DeepSpeed engine; the library sets it right before it loads or saves an engine checkpoint."""
        return self._engine

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self._engine = engine
        if engine is not None and not isinstance(engine.save_checkpoint, functools.partial):
            # frozen weights are no state of the training: they come from where they came at the start
            engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
            engine.load_checkpoint = functools.partial(engine.load_checkpoint, load_module_strict=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model in the form of `saves`; all ranks must call (ZeRO-3 gathers), global rank 0 writes."""
        directory = Path(output_dir or self.args.output_dir)
        keep = bool(self.args.should_save)
        if self.saves == "projector":
            state = zero.collect(weights.projector_parameters(self.model, self.model.config), keep=keep)
            if keep:
                self.model.config.save_pretrained(directory)
                weights.write_bin(weights.projector_file(directory, final=not _internal_call), state)
        elif self.saves == "lora":
            model_setup.save(self.model, self.tokenizer, directory, keep=keep)
        elif self.is_deepspeed_enabled:
            state = weights.all_tensors(self.model, keep=keep)
            if keep:
                self._save(str(directory), state_dict=state)
        elif keep:
            self._save(str(directory))

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes that a save of this run must hold."""
        if self.saves == "projector":
            return weights.shapes(weights.projector_parameters(self.model, self.model.config))
        if self.saves == "lora":
            return model_setup.shapes(self.model)
        return weights.shapes(list(self.model.named_parameters()))

    def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
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
        validation.note_best(self.state, metrics, final)
        if self.args.should_save:
            self.state.save_to_json(str(staging / checkpointing.STATE_FILE))
            weights.verify(staging, self.expected_shapes())
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._rotate_checkpoints(use_mtime=False, output_dir=self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.saves == "projector":
            state = load_bin(Path(resume_from_checkpoint) / PROJECTOR_FILE)
            weights.copy_named(dict((model or self.model).named_parameters()), state)
        elif self.saves == "lora":
            model_setup.load(model or self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """What the library calls after the last step with `--load_best_model_at_end`."""
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
        logger.info("The final weights are those of %s, with a validation loss of %.4g.", best, self.state.best_metric)
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
        if checkpoint is None:
            return
        file = self._rng_file(checkpoint)
        if not file.is_file():
            logger.warning("%s is missing: resuming with another number of processes is not exact.", file)
            return
        checkpointing.set_random_state(checkpointing.read_state(file, "random state"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The library's way; torch before 2.6 would run code from these files if it were not looked for."""
        if checkpoint is not None and not self.is_deepspeed_enabled:
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
                if Path(checkpoint, name).is_file():
                    checkpointing.read_state(Path(checkpoint, name), "the state of an optimizer")
        super()._load_optimizer_and_scheduler(checkpoint)
