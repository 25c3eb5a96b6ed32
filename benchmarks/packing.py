"""Packed steps against the grouped recipe on lengths as in LLaVA-1.5's mixture: `python -m benchmarks.packing`.

The number of records of each part is published (arXiv:2310.03744, table 7). Lengths are not: medians and spreads below
are assumptions from the form of each part (questions per image, boxes, one caption). Fill and balance are those of
Vicuna-7B with InternViT-6B at 336 px. Times are those of one CPU thread with a small model and all lengths divided by
four, which keeps the share of attention low, as in a 7B model; work of other processes does not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.synthetic import Size, make_checkpoint
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.train.flops import Shape, Trainable, row_flops
from llava.train.packing import deal
from llava.train.packing_report import StepStats, report_of_steps, sampled_steps, suggested_budget
from llava.train.steps import Deal, StepPlan, deal_in_order

RANKS, GLOBAL_BATCH, PER_RANK, IMAGE_TOKENS, MAX_LENGTH = 8, 128, 16, 576, 2048
TEMPLATE: Final = 40  # tokens of the system message and the first roles
# The grouped recipe in batches of 16 rows, the same padded as in the reference, and in as few rows as fit in a budget.
WAYS: Final = ("packed", "grouped", "grouped, padded", "grouped, same memory")
SHRINK: Final = 4  # of lengths in the timed steps
SEVEN: Final = Shape(4096, 11008, 32, 32, 32, 32000, 3200, 12800, 45, 577, IMAGE_TOKENS)


class Part(NamedTuple):
    """Records, median text tokens, spread (sigma of the logarithm), and tokens per word, of a part of the mixture."""

    records: int
    tokens: float
    spread: float
    per_word: float
    image: bool = True


PARTS: Final = {
    "LLaVA": Part(158_000, 240, 0.35, 1.5),
    "ShareGPT": Part(40_688, 1300, 0.9, 1.5, image=False),
    "VQAv2": Part(83_000, 170, 0.25, 2.5),
    "GQA": Part(72_000, 360, 0.3, 2.2),
    "OKVQA": Part(9_000, 95, 0.25, 2.2),
    "OCR-VQA": Part(80_000, 180, 0.2, 2.2),
    "A-OKVQA": Part(66_000, 110, 0.15, 1.8),
    "TextCaps": Part(22_000, 130, 0.35, 2.0),
    "RefCOCO": Part(48_000, 380, 0.45, 5.0),  # boxes: a word is many tokens
    "VG": Part(86_000, 560, 0.15, 5.0),
}


class Mixture(NamedTuple):
    """Positions with images expanded, images, and words (negative without image, as the sampler takes them)."""

    positions: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]


def make_mixture(divide: int = 1) -> Mixture:
    """The lengths of the mixture, seeded; `divide` reduces the number of records."""
    draw = np.random.default_rng(0)
    columns = []
    for part in PARTS.values():
        count = part.records // divide
        text = draw.lognormal(np.log(part.tokens), part.spread, count)
        words = np.maximum(1, (text - TEMPLATE) / part.per_word * draw.lognormal(0, 0.08, count))
        images = np.full(count, int(part.image))
        kept = np.clip(text, TEMPLATE + 10, MAX_LENGTH)
        columns.append(np.stack([kept + IMAGE_TOKENS * images, images, np.where(part.image, words, -words)]))
    return Mixture(*np.concatenate(columns, axis=1).astype(np.int64))


def small_model(folder: Path, quick: bool) -> Any:
    """A model with 144 image tokens; the tower is frozen."""
    size = Size(tower_width=128, tower_layers=6, width=64 if quick else 256, layers=2 if quick else 4,
                vocabulary=2000, pixels=168)  # fmt: skip
    model: Any = load_pretrained_model(make_checkpoint(folder, size), device="cpu")[1]
    return model.train()


def batch_of(lengths: Sequence[int], images: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """A collated micro-batch of rows of `lengths` positions; the last fifth of each is supervised."""
    texts = [n - k * (IMAGE_TOKENS // SHRINK - 1) for n, k in zip(lengths, images)]
    ids = torch.randint(10, vocabulary, (len(texts), max(texts)))
    ids[torch.tensor(images, dtype=torch.bool), 3] = IMAGE_TOKEN_INDEX
    places, ends = torch.arange(max(texts)), torch.tensor(texts)[:, None]
    mask = places < ends
    labels = torch.where(
        mask & (places >= ends - torch.tensor(lengths)[:, None] // 5) & (places > 3), ids, IGNORE_INDEX
    )
    pixels = torch.randn(len(texts), 3, 168, 168)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": pixels}


def seconds(
    model: Any, dealt: Deal, lengths: Sequence[int], images: Sequence[int], *, padded: bool
) -> npt.NDArray[np.float64]:
    """CPU times of forward and backward of each micro-batch: (ranks, rounds); `padded` runs transformers' layers."""
    model.supports_packing = not padded
    times = np.zeros((len(dealt), max(map(len, dealt))))
    for rank, batches in enumerate(dealt):
        for index, rows in enumerate(batches):
            if not rows:
                continue
            batch = batch_of([lengths[i] for i in rows], [images[i] for i in rows], model.config.vocab_size)
            start = time.process_time()
            model(**batch, use_cache=False).loss.backward()
            times[rank, index] = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return times


def time_steps(
    model: Any, steps: Sequence[tuple[Sequence[int], Sequence[int], Deal, Deal, Deal]], rounds: int
) -> dict[str, list[float]]:
    """Microseconds a token of `WAYS`: of one process, and of ranks that wait for each other in each round.

    The ways alternate; each micro-batch counts with its fastest of `rounds` runs.
    """
    found: dict[str, list[float]] = {"one process": [0.0] * len(WAYS), "8 ranks": [0.0] * len(WAYS)}
    for lengths, images, ours, grouped, fewer in steps:
        best: list[Any] = [np.inf] * len(WAYS)
        for turn in range(rounds):
            for way in range(len(WAYS)) if turn % 2 else reversed(range(len(WAYS))):
                dealt = (ours, grouped, grouped, fewer)[way]
                best[way] = np.minimum(best[way], seconds(model, dealt, lengths, images, padded=way == 2))
        for way, times in enumerate(best):
            found["one process"][way] += times.sum()
            found["8 ranks"][way] += times.max(0).sum() * RANKS
    tokens = sum(sum(step[0]) for step in steps)
    return {name: [1e6 * value / tokens for value in values] for name, values in found.items()}


def largest(tokens: npt.NDArray[np.int64], rows: int) -> int:
    """Tokens of the largest micro-batch of `rows` consecutive rows."""
    return max(int(tokens[start : start + rows].sum()) for start in range(0, len(tokens), rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2700, 3600, 4800, 7200, 14400], metavar="T")
    parser.add_argument("--steps", type=int, default=300, help="steps of the table (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=2, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each timed step (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few records and a tiny model: measures nothing")
    args = parser.parse_args(argv)
    mixture = make_mixture(100 if args.quick else 1)
    text = mixture.positions - IMAGE_TOKENS * mixture.images
    print(
        f"{len(mixture.positions)} records, {text.mean():.0f} text tokens on average; G {GLOBAL_BATCH}, {RANKS} ranks"
    )
    order = StepPlan(len(mixture.positions), GLOBAL_BATCH, PER_RANK), mixture.words.tolist()
    steps = list(sampled_steps(*order, args.steps, seed=42))
    flops = row_flops(SEVEN, Trainable(), mixture.positions, mixture.images)
    measured = [(mixture.positions[rows], flops[rows]) for rows in steps]
    results = {}
    print(f"\n| T | micro-batches | fill | imbalance of ranks | waiting in rounds | ms a deal |\n|{'---|' * 6}")
    for budget in sorted({choice for T in args.budgets for choice in (T, suggested_budget(measured, RANKS, T)[0])}):
        start = time.perf_counter()
        dealt = [deal(tokens.tolist(), cost.tolist(), RANKS, budget) for tokens, cost in measured]
        spent = (time.perf_counter() - start) / len(measured)
        stats = [StepStats.of(one, *step, budget) for one, step in zip(dealt, measured)]
        results[budget] = mean(found.fill for found in stats)
        print(f"| {budget} | {mean(found.micro_batches for found in stats):.2f} | {results[budget]:.3f} "
              f"| {mean(found.imbalance for found in stats):.4f} | {mean(found.waiting for found in stats):.4f} "
              f"| {1e3 * spent:.1f} |")  # fmt: skip
    best = max(results, key=results.__getitem__)
    few = PER_RANK
    while few > 1 and max(largest(tokens, few) for tokens, _ in measured) > best:
        few //= 2
    for rows_of_rank in (PER_RANK, few):
        print(f"\n{report_of_steps(measured, RANKS, best, rows_of_rank)}\n")
    timed = []
    for rows in sampled_steps(*order, args.timed, seed=42):
        lengths = (mixture.positions[rows] // SHRINK).tolist()
        ours = deal(mixture.positions[rows].tolist(), flops[rows].tolist(), RANKS, best)
        grouped = (deal_in_order(range(len(rows)), RANKS, count) for count in (PER_RANK, few))
        timed.append((lengths, mixture.images[rows].tolist(), ours, *grouped))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        times = time_steps(small_model(Path(folder), args.quick), timed, args.rounds)
    print(f"| microseconds a token, packed in {best}, and ratio | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 1)}")
    for name, values in times.items():
        print(f"| {name} | {' | '.join(f'{value:.1f} ({values[0] / value:.3f})' for value in values)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
