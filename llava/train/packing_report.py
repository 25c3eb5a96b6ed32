"""Fill and balance of packed steps, beside the same steps in micro-batches of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from llava.data.dataset import LazySupervisedDataset
from llava.errors import ConfigError
from llava.model.language_model.packed import attention_groups
from llava.model.tokenizer import load_tokenizer
from llava.train.flops import Shape, Trainable
from llava.train.model_setup import template_name
from llava.train.packing import Integers, Packer, deal
from llava.train.steps import Deal, StepPlan, deal_in_order, record_sampler

POOR_FILL: Final = 0.95
FLAGS: Final = {
    "budget": "micro_batch_tokens",
    "global_batch": "global_batch_size",
    "ranks": "ranks",
    "steps": "steps",
}
Measured = tuple[Integers, npt.NDArray[np.float64]]  # tokens and FLOPs of the rows of a step
SLACKS: Final = (0.003, 0.01, 0.02, 0.04)  # tried: parts of the budget that no row is small enough for


@dataclass(frozen=True)
class StepStats:
    """A step as it is dealt: `micro_batches` of each rank, and fractions.

    `fill` is the part of the budget that is used, `attention` the part of the attention that is not padding,
    `imbalance` the FLOPs of the rank with the most above the mean, and `waiting` those of the slowest micro-batch of
    each round, summed, above the mean.
    """

    micro_batches: int
    largest: int
    fill: float
    attention: float
    imbalance: float
    waiting: float

    @classmethod
    def of(cls, dealt: Deal, tokens: Integers, flops: npt.NDArray[np.float64], budget: int) -> StepStats:
        """Statistics of rows dealt as `llava.train.packing.deal` does."""
        rounds = list(zip_longest(*dealt, fillvalue=()))
        sizes, work = (np.array([[n[list(rows)].sum() for rows in ranks] for ranks in rounds]) for n in (tokens, flops))
        computed = 0.0
        for rows in (rows for batches in dealt for rows in batches):
            for group in attention_groups(tokens[rows].tolist()):
                computed += len(group) * float(tokens[rows[group[0]]]) ** 2
        by_rank = work.sum(0)  # of (rounds, ranks)
        return cls(
            micro_batches=len(rounds),
            largest=int(sizes.max()),
            fill=float(sizes.sum() / (sizes.size * budget)),
            attention=float((tokens.astype(np.float64) ** 2).sum() / computed),
            imbalance=float(by_rank.max() / by_rank.mean() - 1),
            waiting=float(work.max(1).sum() / work.mean(1).sum() - 1),
        )


def packed_stats(measured: Sequence[Measured], ranks: int, budget: int) -> list[StepStats]:
    """Statistics of packed steps."""
    return [
        StepStats.of(deal(tokens.tolist(), flops.tolist(), ranks, budget), tokens, flops, budget)
        for tokens, flops in measured
    ]


def suggested_budget(measured: Sequence[Measured], ranks: int, budget: int) -> tuple[int, float]:
    """Budget near `budget` whose micro-batches are fullest, and how full they are.

    The number of micro-batches is an integer, so the fill rises with the budget until they become fewer.
    """
    totals = np.array([tokens.sum() for tokens, _ in measured], np.float64)
    budgets = np.arange(int(0.75 * budget), int(1.5 * budget) + 1, max(1, budget // 400))
    chosen = {budget}
    for slack in SLACKS:
        counts = np.ceil(totals / (ranks * (1 - slack) * budgets[:, None]))  # (budgets, steps)
        chosen.add(int(budgets[(budgets * counts.sum(1)).argmin()]))
    fills = {choice: mean(stats.fill for stats in packed_stats(measured, ranks, choice)) for choice in sorted(chosen)}
    best = max(fills, key=fills.__getitem__)
    return best, fills[best]


def sampled_steps(plan: StepPlan, modality_lengths: Sequence[int] | None, steps: int, seed: int) -> Iterator[list[int]]:
    """Rows of up to `steps` steps, evenly spread over the first epoch of a run with this seed."""
    generator = torch.Generator().manual_seed(seed)
    order = list(record_sampler(plan, generator, modality_lengths, by_modality=True))
    full = max(1, plan.records // plan.global_batch)
    chosen = min(steps, full)
    for step in ((np.arange(chosen) + 0.5) * full / chosen).astype(int).tolist():
        yield order[step * plan.global_batch : (step + 1) * plan.global_batch]


@dataclass(frozen=True)
class SampledRun:
    """A run whose packing is computed for some steps, with the tokenizer of `directory`.

    `group` is the loss group; without one, a rank's share of the step.
    """

    file: Path
    directory: Path
    version: str
    max_length: int
    shape: Shape | None
    trainable: Trainable
    image_tokens: int
    ranks: int
    budget: int
    global_batch: int
    group: int | None
    by_modality: bool
    seed: int
    steps: int = 50

    @property
    def group_size(self) -> int:
        """Consecutive rows of a micro-batch without packing."""
        return self.group or max(1, self.global_batch // self.ranks)

    def packer(self) -> tuple[Packer, list[list[int]]]:
        """The packer of the run, and the records of the sampled steps; no image is opened."""
        tokenizer = load_tokenizer(self.directory, model_max_length=self.max_length, padding_side="right")
        args: Any = SimpleNamespace(is_multimodal=True, on_bad_sample="skip")
        dataset = LazySupervisedDataset(str(self.file), tokenizer, args, template_name(self.version))
        lengths = dataset.modality_lengths if self.by_modality else None
        plan = StepPlan(len(dataset), self.global_batch, self.group_size)
        steps = sampled_steps(plan, lengths, self.steps, self.seed)
        return Packer(dataset, self.shape, self.trainable, self.image_tokens, self.ranks, self.budget), list(steps)


def packing_report(run: SampledRun) -> str:
    """A table of sampled steps: packed, and in micro-batches of consecutive rows; and a better budget, if there is one.

    Raises `ConfigError` for counts that training would refuse.
    """
    for name, flag in FLAGS.items():
        if getattr(run, name) < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {getattr(run, name)}.")
    group = run.group_size
    if group < 1 or run.global_batch % group:
        raise ConfigError(f"--loss_group_size must divide --global_batch_size {run.global_batch}, got {group}.")
    packer, steps = run.packer()
    return report_of_steps([packer.measure(rows) for rows in steps], run.ranks, run.budget, group)


def report_of_steps(measured: Sequence[Measured], ranks: int, budget: int, group: int) -> str:
    """As `packing_report`, for the tokens and FLOPs of the rows of each step."""
    ours = packed_stats(measured, ranks, budget)
    plain = [StepStats.of(deal_in_order(range(len(row[0])), ranks, group), *row, budget) for row in measured]
    longer = sum(int((tokens > budget).sum()) for tokens, _ in measured)
    lines = [
        f"{len(measured)} steps of {max(len(row[0]) for row in measured)} records on {ranks} ranks, "
        f"{mean(int(tokens.sum()) for tokens, _ in measured):.0f} tokens a step",
        "",
        f"  {'':<54}{f'packed in {budget} tokens':>24}{f'{group} consecutive rows':>24}",
    ]
    for name, values in _rows(ours, plain):
        lines.append(f"  {name:<54}" + "".join(f"{value:>24}" for value in values))
    if longer:
        lines += ["", f"{longer} records are longer than the budget; each is a micro-batch by itself."]
    fill = mean(stats.fill for stats in ours)
    better, found = suggested_budget(measured, ranks, budget) if fill < POOR_FILL else (budget, fill)
    if found > fill + 0.01:
        lines += ["", f"--micro_batch_tokens {better} would fill {_percent(found)} of the budget."]
    return "\n".join(lines)


def _rows(*columns: list[StepStats]) -> Iterator[tuple[str, list[str]]]:
    counts = [[stats.micro_batches for stats in column] for column in columns]
    yield "micro-batches of a rank: min, median, max", [f"{min(n)}, {median(n):g}, {max(n)}" for n in counts]
    yield "tokens of the largest micro-batch", [str(max(stats.largest for stats in column)) for column in columns]
    yield "fill of the budget", [_percent(mean(stats.fill for stats in columns[0])), "-"]
    yield "real tokens in linear layers", ["100.0 %"] * len(columns)
    yield "real tokens in attention", [_percent(mean(stats.attention for stats in column)) for column in columns]
    imbalance = [[stats.imbalance for stats in column] for column in columns]
    yield (
        "FLOPs of the busiest rank above the mean: mean, worst",
        [f"{_percent(mean(n))}, {_percent(max(n))}" for n in imbalance],
    )
    waiting = [_percent(mean(stats.waiting for stats in column)) for column in columns]
    yield "FLOPs of the busiest rank of each round above the mean", waiting


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
