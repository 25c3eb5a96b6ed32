"""Time between tokens of running streams while a prompt joins: `python -m benchmarks.joins [--dtype bfloat16]`.

16 streams decode; a text prompt of 2,000 tokens joins, then a prompt with an image; with chunked prefill ("auto", the
default of a worker) and without, in turns. In float32, the first tokens of both ways must be equal. The exit status is
1 if they are not, or if the 99th percentile with chunks is above twice the median of the streams alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.eval import QUICK
from benchmarks.serve import quantile
from benchmarks.synthetic import Size, make_checkpoint
from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine import Engine, Request, RequestHandle, SamplingParams
from llava.engine.cache import LRUCache
from llava.engine.token_budget import TokenBudget, TokenLimit
from llava.model.builder import load_pretrained_model

WAYS: tuple[TokenLimit, ...] = ("auto", None)
TARGET = 2.0


@dataclass(frozen=True)
class Load:
    """Number of streams, their prompt tokens, steps measured without a new prompt, and tokens of the long one."""

    streams: int = 16
    prompt: int = 256
    alone: int = 48
    long: int = 2000
    turns: int = 5


@dataclass
class Joined:
    """Seconds between two tokens of every stream while a prompt joins, from its arrival to its first token; and its
    seconds to the first token in each turn."""

    between: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def words(count: int, seed: str) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(260, 380) for _ in range(count)]


def step(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def join(engine: Engine, request: Request, joined: Joined) -> RequestHandle:
    """Submit a request, and step until its first token. Every step gives each of the streams one token."""
    rows, start = engine.running, time.perf_counter()
    handle = engine.submit(request)
    while engine.running == rows:
        joined.between.append(step(engine))
    joined.first.append(time.perf_counter() - start)
    joined.tokens.append(engine._running[-1].tokens[0])
    return handle


def requests(load: Load, turn: int, pixels: int) -> dict[str, Request]:
    """The prompts that join in one turn, by name."""
    image = torch.randn(3, pixels, pixels, generator=torch.Generator().manual_seed(turn))
    asks = {
        f"{load.long:,} tokens": (words(load.long, f"long {turn}"), []),
        "an image": ([*words(35, "system"), IMAGE_TOKEN_INDEX, *words(40, f"ask {turn}")], [image]),
    }
    return {name: Request(ids, images, SamplingParams(64), cache_prefix=False) for name, (ids, images) in asks.items()}


def run_turn(engine: Engine, load: Load, turn: int, pixels: int, alone: list[float], found: dict[str, Joined]) -> None:
    endless = SamplingParams(engine.model_runner.context_length)
    streams = [
        engine.submit(Request(words(load.prompt, f"stream {turn} {n}"), params=endless, cache_prefix=False))
        for n in range(load.streams)
    ]
    for _ in range(12):  # more than a burst of arrivals
        engine.step()
    alone += [step(engine) for _ in range(load.alone)]
    for way in WAYS if turn % 2 else WAYS[::-1]:
        engine._budget.limit = way
        for name, request in requests(load, turn, pixels).items():
            engine.prefiller.prefix_cache.clear()
            engine.features.store = LRUCache(engine.features.store.budget)
            handle = join(engine, request, found.setdefault(f"{name}, {way}", Joined()))
            handle.cancel()
            alone += [step(engine) for _ in range(load.alone // 4)]
    for stream in streams:
        stream.cancel()
    engine.step()


def report(streams: int, alone: Sequence[float], found: dict[str, Joined]) -> bool:
    """Print the table; true if the target is met."""
    median, met = statistics.median(alone), True
    print(f"| {streams} streams and | median between two tokens | p99 | p99 / median alone | its first token after |")
    print("|---|---|---|---|---|")
    print(f"| nothing else | {1000 * median:.1f} ms | {1000 * quantile(alone, 0.99):.1f} ms "
          f"| {quantile(alone, 0.99) / median:.2f} | |")  # fmt: skip
    for name, joined in sorted(found.items()):
        late = quantile(joined.between, 0.99)
        prompt, _, way = name.rpartition(", ")
        chunked = way == "auto"
        met &= not chunked or late <= TARGET * median
        print(f"| {prompt}, {'in chunks' if chunked else 'at once'} ({len(joined.between)} steps) "
              f"| {1000 * statistics.median(joined.between):.1f} ms | {1000 * late:.1f} ms | {late / median:.2f} "
              f"| {statistics.median(joined.first):.2f} s |")  # fmt: skip
    return met


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joins", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="a small model: a smoke test whose figures mean nothing")
    args = parser.parse_args(argv)
    size, load = (QUICK, Load(4, 16, 16, 200, 1)) if args.quick else (Size(), Load())
    alone: list[float] = []
    found: dict[str, Joined] = {}
    with tempfile.TemporaryDirectory() as directory:
        chat = make_checkpoint(Path(directory), size)
        tokenizer, model, processor, _ = load_pretrained_model(chat, device="cpu", dtype=args.dtype)
        engine = Engine(model, tokenizer, processor, max_batch_size=load.streams + 1)
        engine._budget = TokenBudget("auto", "cpu", engine.features)
        engine.special.end = frozenset()  # no stream ends
        run_turn(engine, load, 0, size.pixels, [], {})  # warm-up
        for turn in range(1, load.turns + 1):
            run_turn(engine, load, turn, size.pixels, alone, found)
    same = all(found[name].tokens == found[name.replace("auto", "None")].tokens for name in found if "auto" in name)
    print(f"{args.dtype}: first tokens {'equal' if same else 'DIFFERENT'} in chunks and at once")
    met = report(load.streams, alone, found)
    return 0 if (met or args.quick) and (same or args.dtype != "float32") else 1


if __name__ == "__main__":
    raise SystemExit(main())
