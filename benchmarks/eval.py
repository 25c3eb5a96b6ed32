"""Benchmark-shaped questions, batched by the engine and one at a time: `python -m benchmarks.eval [--quick]`.

Both sides use the same float32 weights and must give the same answers. They alternate, with new images each turn; the
medians are compared. Prompts have the published lengths under Vicuna's tokenizer: a system prompt of 35 tokens, the
image, and the question. The engine is also measured in bfloat16, without comparing answers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Peaks, Work, floor_seconds, peaks
from benchmarks.reference_way import use_reference_tower
from benchmarks.synthetic import Size, make_checkpoint
from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine import Engine, Request, SamplingParams
from llava.model.builder import load_pretrained_model

SYSTEM = 35
STEM = 20  # tokens of a question before its options
QUICK = Size(tower_width=128, tower_layers=4, width=128, layers=2, pixels=56)


@dataclass(frozen=True)
class Shape:
    """`questions` per image, each of `tokens` (min, max) tokens; `options`: rotated options, if any."""

    name: str
    questions: int
    tokens: tuple[int, int]
    new_tokens: int
    images: int  # per turn
    options: int = 0
    wanted: float = 0.0


SHAPES = (
    Shape("POPE", 18, (25, 29), 2, 1, wanted=13),
    Shape("GQA", 31, (26, 40), 3, 1, wanted=18),
    Shape("VQAv2", 3, (24, 32), 3, 5, wanted=2.8),
    Shape("caption", 1, (14, 14), 64, 8, wanted=2.5),
    Shape("MMBench", 4, (60, 90), 2, 4, options=4, wanted=3),
)


@dataclass
class Times:
    """Seconds of each turn, by implementation."""

    reference: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    half: list[float] = field(default_factory=list)  # the engine in bfloat16
    questions: int = 0
    same: bool = True

    @property
    def ratio(self) -> float:
        return statistics.median(self.reference) / statistics.median(self.engine)


def prompts(shape: Shape, seed: int, pixels: int) -> list[tuple[list[int], Tensor]]:
    """Token ids with one image placeholder, and pixels (3, S, S), for one turn."""
    chance = random.Random(f"{shape.name} {seed}")

    def words(count: int) -> list[int]:
        return [chance.randrange(260, 380) for _ in range(count)]

    system, rows = [1, *random.Random(0).choices(range(260, 380), k=SYSTEM - 1)], []
    for _ in range(shape.images):
        image = torch.randn(3, pixels, pixels, generator=torch.Generator().manual_seed(chance.randrange(2**31)))
        stem, ask = words(STEM), words(18)
        options = [words(chance.randint(*shape.tokens) // max(1, shape.options)) for _ in range(shape.options)]
        for question in range(shape.questions):
            turned = options[question:] + options[:question]
            behind = words(chance.randint(*shape.tokens))
            if options:
                behind = [*stem, *chain.from_iterable(turned), *ask]
            rows.append(([*system, IMAGE_TOKEN_INDEX, *behind], image))
    return rows


def one_at_a_time(model: Any, rows: Sequence[tuple[list[int], Tensor]], new_tokens: int) -> list[list[int]]:
    """Answer each question with `generate`."""
    answers = []
    for ids, image in rows:
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), images=image.unsqueeze(0), do_sample=False, use_cache=True,
                                 max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)  # fmt: skip
        answers.append(out[0, len(ids) :].tolist())
    return answers


def together(engine: Engine, rows: Sequence[tuple[list[int], Tensor]], new_tokens: int) -> list[list[int]]:
    """Answer all questions in one engine call."""
    params = SamplingParams(max_new_tokens=new_tokens)
    requests = [Request(ids, [image], params, cache_prefix=False) for ids, image in rows]
    return [list(done.token_ids) for done in engine.generate(requests)]


class Ways:
    """The reference implementation, the engine on the same weights, and the engine in bfloat16."""

    def __init__(self, chat: Path, batch: int) -> None:
        _, self.reference, _, _ = load_pretrained_model(chat, device="cpu")
        use_reference_tower(self.reference, self.reference.config.mm_vision_tower, torch.float32)
        self.engine, self.half = (self._engine(chat, dtype, batch) for dtype in ("float32", "bfloat16"))

    @staticmethod
    def _engine(chat: Path, dtype: str, batch: int) -> Engine:
        tokenizer, model, processor, _ = load_pretrained_model(chat, device="cpu", dtype=dtype)
        engine = Engine(model, tokenizer, processor, max_batch_size=batch)
        engine.special.end = frozenset()  # fixed answer length on both sides
        return engine

    def measure(self, shape: Shape, turns: int, pixels: int) -> Times:
        times = Times()
        for turn in range(-1, turns):  # warm-up first
            rows = prompts(shape, turn, pixels)
            if turn < 0:
                rows = rows[: shape.questions]
            answers, seconds = [], []
            for ask in (
                lambda: one_at_a_time(self.reference, rows if turn >= 0 else rows[:1], shape.new_tokens),  # noqa: B023
                lambda: together(self.engine, rows, shape.new_tokens),  # noqa: B023
                lambda: together(self.half, rows, shape.new_tokens),  # noqa: B023
            ):
                start = time.perf_counter()
                answers.append(ask())
                seconds.append(time.perf_counter() - start)
            if turn >= 0:
                times.same &= answers[0] == answers[1]
                times.reference.append(seconds[0])
                times.engine.append(seconds[1])
                times.half.append(seconds[2])
                times.questions = len(rows)
        return times


def work_of(shape: Shape, size: Size, batch: int) -> Work:
    """Minimum work for one image with its questions."""
    behind = [len(ids) - SYSTEM - 1 for ids, _ in prompts(shape, 0, 14)[: shape.questions]]
    own = sum(behind) - (STEM * (shape.questions - 1) if shape.options else 0)
    batches = max(1.0, shape.questions * shape.images / batch)
    steps = (shape.new_tokens - 1) * batches / shape.images
    return Work((size.pixels // 14) ** 2, own, shape.questions, steps, shape.new_tokens)


def row(shape: Shape, times: Times, size: Size, machine: tuple[Peaks, Peaks], batch: int) -> str:
    """A row of the table; floors are those of the engine."""
    reference, engine, half = (statistics.median(part) / times.questions for part in
                               (times.reference, times.engine, times.half))  # fmt: skip
    work = work_of(shape, size, batch)
    floors = [floor_seconds(size, work, peak, dtype) / shape.questions
              for peak, dtype in zip(machine, (torch.float32, torch.bfloat16))]  # fmt: skip
    same = "same answers" if times.same else "OTHER ANSWERS"
    return (
        f"| {shape.name}: {shape.questions} per image, {shape.new_tokens} new tokens ({same}) | {1 / reference:.2f} /s "
        f"| {1 / engine:.2f} /s | {times.ratio:.1f} (wanted {shape.wanted:g}) | {1 / floors[0]:.1f} /s, "
        f"{floors[0] / engine:.0%} | {1 / half:.2f} /s of {1 / floors[1]:.0f} /s |"
    )


HEAD = (
    "| questions | one at a time | engine | ratio | floor in float32, reached | bfloat16, of its floor |",
    "|---|---|---|---|---|---|",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval", description=__doc__)
    parser.add_argument("shapes", nargs="*", choices=[[], *(shape.name for shape in SHAPES)], help="default: all")
    parser.add_argument("--quick", action="store_true", help="a small model: a smoke test whose figures mean nothing")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(argv)
    size = QUICK if args.quick else Size()
    width = 64 if args.quick else 2048
    machine = peaks(torch.float32, width), peaks(torch.bfloat16, width)
    print(f"peaks: {machine[0].operations / 1e12:.2f} and {machine[1].operations / 1e12:.2f} TFLOP/s, "
          f"{machine[0].read / 1e9:.0f} and {machine[1].read / 1e9:.0f} GB/s in float32 and bfloat16")  # fmt: skip
    print(*HEAD, sep="\n")
    whole = True
    with tempfile.TemporaryDirectory() as directory:
        ways = Ways(make_checkpoint(Path(directory), size), args.batch_size)
        for shape in SHAPES:
            if not args.shapes or shape.name in args.shapes:
                times = ways.measure(shape, args.turns, size.pixels)
                whole &= times.same
                print(row(shape, times, size, machine, args.batch_size), flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
