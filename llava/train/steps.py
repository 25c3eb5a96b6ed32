"""Optimizer steps of an epoch: which micro-batches a step takes on which rank, and how their losses are weighted.

Each epoch trains on every record once and ends with a step over what is left. The loss of a step is the mean over its
micro-batches on all ranks, also of a last step that has fewer than the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch.utils.data import BatchSampler, Sampler

from llava.arguments import DataArguments, TrainingArguments
from llava.data.annotations import read_records
from llava.data.mixture import read_mixture
from llava.errors import ConfigError

FILLER: Final = [0]  # records of a micro-batch without weight


@dataclass(frozen=True)
class EpochPlan:
    """Steps of `accumulation` x `ranks` places, which take the `batches` micro-batches of an epoch in turn.

    A last step with fewer micro-batches than places keeps its first rounds (one place per rank) idle. Libraries count
    them like any other, so that all steps have the same number of rounds. The rest of its places, if any, are fillers.
    """

    batches: int
    accumulation: int
    ranks: int

    @classmethod
    def of(cls, records: int, args: TrainingArguments) -> EpochPlan:
        """The plan of a run; `--dataloader_drop_last` drops the records that do not fill a step."""
        per_step = args.gradient_accumulation_steps * args.world_size
        batches = math.ceil(records / args.train_batch_size)
        if args.dataloader_drop_last:
            batches = records // args.train_batch_size // per_step * per_step
        if not batches:
            raise ConfigError(
                f"--dataloader_drop_last True drops all {records} records, because a step takes "
                f"{per_step * args.train_batch_size}; drop the flag, or lower --global_batch_size."
            )
        return cls(batches, args.gradient_accumulation_steps, args.world_size)

    @property
    def per_step(self) -> int:
        return self.accumulation * self.ranks

    @cached_property
    def steps(self) -> int:
        return math.ceil(self.batches / self.per_step)

    @cached_property
    def _last(self) -> int:
        """First micro-batch of the last step."""
        return (self.steps - 1) * self.per_step

    @cached_property
    def _idle(self) -> int:
        """Number of idle rounds of the last step."""
        return self.accumulation - math.ceil((self.batches - self._last) / self.ranks)

    def is_idle(self, index: int) -> bool:
        """Whether the round with the `index`-th micro-batch of each rank computes nothing."""
        return 0 <= index * self.ranks - self._last < self._idle * self.ranks

    def weight(self, index: int, rank: int) -> float:
        """Factor of the loss of the `index`-th micro-batch of a rank; 0 for idle rounds and fillers."""
        place = index * self.ranks + rank
        if place < self._last:
            return 1.0
        if self.is_idle(index) or place - self._idle * self.ranks >= self.batches:
            return 0.0
        return self.per_step / (self.batches - self._last)


class StepBatchSampler(BatchSampler):
    """Micro-batches of one rank by an `EpochPlan`; all ranks draw the same order from `sampler`."""

    def __init__(self, sampler: Sampler[int], batch_size: int, plan: EpochPlan, rank: int):
        super().__init__(sampler, batch_size, drop_last=False)
        self.plan, self.rank = plan, rank

    def __len__(self) -> int:
        return self.plan.steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        batches = super().__iter__()
        for index in range(len(self)):
            round_of_all = [
                next(batches) if self.plan.weight(index, rank) else FILLER for rank in range(self.plan.ranks)
            ]
            yield round_of_all[self.rank]


def total_steps(plan: EpochPlan, args: TrainingArguments) -> int:
    """Number of optimizer steps of a whole run."""
    return int(args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps))


def check_drop_last(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raise `ConfigError` if `--dataloader_drop_last` would drop every record; reads the data files' indexes only."""
    if not args.dataloader_drop_last:
        return
    if data_args.meta_path:
        entries = read_mixture(data_args.meta_path)
        records = sum(len(read_records(entry.annotation)) * entry.repeat_time for entry in entries)
    else:
        records = len(read_records(data_args.data_path or ""))
    EpochPlan.of(records - round(data_args.validation_fraction * records), args)
