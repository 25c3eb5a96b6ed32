"""Optimizer steps as sets of records: which records a step takes, how their losses are weighted, and who computes them.

A step is the next `--global_batch_size` records of an order that depends on seed, epoch, `--global_batch_size` and
`--loss_group_size` only. Its loss is the mean over groups of `--loss_group_size` consecutive records, each group's the
mean over its supervised tokens. Ranks, micro-batches and packing only deal the records of a step out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler

from llava.arguments import DataArguments, TrainingArguments
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.annotations import read_records
from llava.data.mixture import read_mixture
from llava.data.sampler import LengthGroupedSampler
from llava.errors import ConfigError

NO_GROUP: Final = -1
COUNTS: Final = ("tokens", "supervised", "samples", "images")
Deal = list[list[list[int]]]  # by rank, its micro-batches, each a list of records
Dealer = Callable[[Sequence[int]], Deal]  # of the records of a step


class MicroBatch(NamedTuple):
    """Records of one forward and backward pass, and the loss group of each within its step."""

    records: tuple[int, ...]
    groups: tuple[int, ...]


FILLER = MicroBatch((0,), (NO_GROUP,))  # computed without weight, because every rank takes part in each exchange
Step = list[MicroBatch]  # of one rank
Batch = Mapping[str, Tensor]
LoadedStep = list[tuple[MicroBatch, Batch]]


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of an epoch of `records` records; the last one takes what is left, unless `drop_last`."""

    records: int
    global_batch: int
    group: int
    drop_last: bool = False

    @classmethod
    def of(cls, records: int, args: TrainingArguments) -> StepPlan:
        """The plan of a run; raises `ConfigError` if `--dataloader_drop_last` drops every record."""
        assert args.global_batch_size and args.loss_group_size
        plan = cls(records, args.global_batch_size, args.loss_group_size, args.dataloader_drop_last)
        if not plan.steps:
            raise ConfigError(
                f"--dataloader_drop_last True drops all {records} records, because a step takes {plan.global_batch}; "
                "drop the flag, or lower --global_batch_size."
            )
        return plan

    @property
    def steps(self) -> int:
        return self.records // self.global_batch if self.drop_last else math.ceil(self.records / self.global_batch)

    def groups(self, step: int) -> int:
        """Number of loss groups of the `step`-th step of an epoch."""
        return math.ceil(min(self.global_batch, self.records - step * self.global_batch) / self.group)


def record_sampler(
    plan: StepPlan, generator: torch.Generator, lengths: Sequence[int] | None = None, *, by_modality: bool = False
) -> Sampler[int]:
    """The order of an epoch: random, or with `lengths` grouped as by one process for each loss group of a step."""
    if lengths is None:
        return RandomSampler(range(plan.records), generator=generator)
    return LengthGroupedSampler(
        plan.group, plan.global_batch // plan.group, lengths, generator, group_by_modality=by_modality
    )


def deal_in_order(records: Sequence[int], ranks: int, batch_size: int) -> Deal:
    """By rank, micro-batches of `batch_size` consecutive records; the ranks take them in turn."""
    batches = [list(records[start : start + batch_size]) for start in range(0, len(records), batch_size)]
    return [batches[rank::ranks] for rank in range(ranks)]


def describe_fillers(plan: StepPlan, ranks: int, batch_size: int) -> str | None:
    """A sentence about ranks that `deal_in_order` leaves idle in every step, or None."""
    batches = math.ceil(plan.global_batch / batch_size)
    places = math.ceil(batches / ranks) * ranks
    if places == batches:
        return None
    best = math.ceil(plan.global_batch / places)
    return (
        f"{places - batches} of {places} micro-batches of a step are idle: {plan.global_batch} samples are {batches} "
        f"micro-batches of {batch_size} for {ranks} processes. --per_device_train_batch_size {best} splits them evenly."
    )


class StepSampler(Sampler[Step]):
    """The steps of one rank by a `StepPlan`; all ranks draw the same order from `sampler` and `deal` the same way.

    The first `done` steps, which a resumed run skips, are empty and cost nothing.
    """

    def __init__(self, sampler: Sampler[int], plan: StepPlan, deal: Dealer, rank: int):
        self.sampler, self.plan, self.deal, self.rank = sampler, plan, deal, rank
        self.done = 0

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[Step]:
        order = list(self.sampler)
        yield from ([] for _ in range(self.done))
        for step in range(self.done, self.plan.steps):
            records = order[step * self.plan.global_batch : (step + 1) * self.plan.global_batch]
            group = {record: position // self.plan.group for position, record in enumerate(records)}
            dealt = self.deal(records)
            micro_batches = [
                MicroBatch(tuple(own), tuple(map(group.__getitem__, own))) for own in dealt[self.rank] if own
            ]
            yield micro_batches + [FILLER] * (max(map(len, dealt)) - len(micro_batches))


class StepDataset(Dataset[tuple[MicroBatch, Batch]]):
    """Loads micro-batches of `dataset`, collated by `collate`."""

    def __init__(self, dataset: Dataset[dict[str, Tensor]], collate: Callable[[Sequence[dict[str, Tensor]]], Batch]):
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[MicroBatch, Batch]:
        return micro_batch, self.collate([self.dataset[record] for record in micro_batch.records])


def count_supervised(batch: Batch) -> Tensor:
    """Number of supervised tokens of each row, `(B,)` int64, without the first, which nothing predicts."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)


def count_step(step: LoadedStep, image_tokens: int) -> dict[str, int]:
    """Tokens, images expanded to `image_tokens`, supervised tokens, samples and images of a step, without fillers."""
    counts = dict.fromkeys(COUNTS, 0)
    for micro_batch, batch in step:
        if micro_batch != FILLER:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            counts["tokens"] += ids.numel() if mask is None else int(mask.sum())
            counts["tokens"] += int((ids == IMAGE_TOKEN_INDEX).sum()) * (max(1, image_tokens) - 1)
            counts["supervised"] += int(count_supervised(batch).sum())
            counts["samples"] += len(ids)
            counts["images"] += len(batch.get("images", ()))
    return counts


def tokens_of_groups(step: LoadedStep, groups: int) -> Tensor:
    """Supervised tokens of this rank in each loss group: `(groups,)` int64."""
    counts = torch.zeros(groups + 1, dtype=torch.int64)  # the last for fillers, whose group is -1
    for micro_batch, batch in step:
        counts.index_add_(0, torch.tensor(micro_batch.groups) % (groups + 1), count_supervised(batch))
    return counts[:-1]


def row_weights(step: LoadedStep, tokens: Tensor, groups: int, ranks: int) -> list[Tensor]:
    """Weight of each supervised token of a row, `(B,)` float32 on the device of `tokens`, for each micro-batch.

    `tokens` `(groups,)` counts the supervised tokens of each loss group on all ranks. The weights are multiplied by the
    number of ranks, because gradients are averaged over them.
    """
    weights = torch.cat([ranks / (groups * tokens.clamp(min=1).double()), tokens.new_zeros(1)]).float()
    members = torch.tensor([group for micro_batch, _ in step for group in micro_batch.groups]) % (groups + 1)
    sizes = [len(micro_batch.groups) for micro_batch, _ in step]
    return list(torch.split(weights[members.to(tokens.device)], sizes))


def sum_over_ranks(counts: Tensor, device: torch.device) -> Tensor:
    """Sum of integers over all ranks, on `device`."""
    counts = counts.to(device, non_blocking=True)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def total_steps(plan: StepPlan, args: TrainingArguments) -> int:
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
    StepPlan.of(records - round(data_args.validation_fraction * records), args)
