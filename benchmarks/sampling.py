"""Top-p sampling on the CPU, ours against sorting the whole vocabulary: `python -m benchmarks.sampling`.

The baseline draws with `torch.multinomial`. Both use the same seeds and must return the same tokens. The logits are
random normal numbers of several scales.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.engine.sampling import Sampler, make_generator
from llava.engine.sequence import SamplingParams

SCALES = (1.0, 2.0, 4.0)


def by_sorting(logits: Tensor, params: Sequence[SamplingParams]) -> list[int]:
    """Next tokens of logits (B, V): softmax, a sort of all V probabilities, and `torch.multinomial`, row by row."""
    tokens = []
    for row, one in zip(logits, params, strict=True):
        probabilities = torch.softmax(row / one.temperature, dim=-1)
        ordered, order = probabilities.sort(descending=True, stable=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= one.top_p, 0.0)
        kept = torch.zeros_like(probabilities).scatter_(0, order, ordered)
        tokens.append(int(torch.multinomial(kept / kept.sum(), 1, generator=make_generator(one))))
    return tokens


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args(argv)
    theirs, ours, same = [], [], 0
    for turn in range(-1, args.turns):  # the first is not counted
        logits = torch.randn(args.rows, args.vocabulary, generator=torch.Generator().manual_seed(turn + 1))
        logits *= SCALES[turn % len(SCALES)]
        params = [
            SamplingParams(temperature=args.temperature, top_p=args.top_p, seed=100 * (turn + 1) + row)
            for row in range(args.rows)
        ]
        start = time.perf_counter()
        expected = by_sorting(logits, params)
        between = time.perf_counter()
        found = Sampler(params, [make_generator(one) for one in params]).sample(logits).tolist()
        end = time.perf_counter()
        if turn >= 0:
            theirs.append(between - start)
            ours.append(end - between)
            same += sum(one == other for one, other in zip(expected, found, strict=True))
    before, after = statistics.median(theirs), statistics.median(ours)
    total = args.turns * args.rows
    print(
        f"{args.rows} rows of {args.vocabulary:,}: sorting {1000 * before:.2f} ms, ours {1000 * after:.2f} ms, ratio "
        f"{after / before:.3f}; {same} of {total} tokens the same"
    )
    return 0 if same == total else 1


if __name__ == "__main__":
    raise SystemExit(main())
