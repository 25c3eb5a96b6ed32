"""Serving throughput and latency with many clients, against the reference: `python -m benchmarks.serve [--quick]`.

Both sides are processes with the same float32 weights and serve the same HTTP clients. Ours is the model worker; the
reference is benchmarks/serve_reference.py with its best number of threads. Answers have a fixed length. Exits with
status 1 if answers differ or a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.eval import QUICK
from benchmarks.serve_client import Clients, Seen, body, photo, prompt, question, rate
from benchmarks.synthetic import Size, make_answers_differ, make_checkpoint
from tests.serve.programs import program
from tests.serve.stubs import get, until

CLIENTS = 16


@dataclass(frozen=True)
class Plan:
    """Sizes of the load."""

    size: Size
    tokens: int = 128  # per answer
    conversations: int = 5
    short: int = 32  # tokens per answer under overload
    limit: int = 8  # concurrent requests, and as many in the queue
    arrivals: int = 100


FULL = Plan(Size())
SMALL = Plan(QUICK, tokens=4, conversations=1, short=2, limit=2, arrivals=8)


@contextmanager
def serving(module: str, *words: str, threads: int | None = None) -> Iterator[Clients]:
    """A worker in a separate process, warmed up by one request."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAVA_")}
    environment |= {"NO_PROXY": "*", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with program(environment, module, *words) as running:
        if module == "model_worker":
            until(lambda: get(running.url, "/ready").status_code == 200, 300)
        clients = Clients(running.url)
        asyncio.run(clients.ask(body(prompt(question(900), None), photo(900), 2)))
        yield clients


def ours(chat: Path, limit: int, queue: int | None = None) -> tuple[str, ...]:
    words = ("--no-register", "--port", "0", "--device", "cpu", "--model-path", str(chat))
    return ("model_worker", *words, "--limit-model-concurrency", str(limit), "--queue-limit", str(queue or 8 * limit))


def distinct(tokens: int) -> list[dict[str, object]]:
    return [body(prompt(question(n), None), photo(n), tokens) for n in range(CLIENTS)]


def one_image(tokens: int) -> list[dict[str, object]]:
    return [body(prompt(question(100 + n), None), photo(100), tokens) for n in range(CLIENTS)]


def second_turns(clients: Clients, plan: Plan, first: int) -> tuple[float, float]:
    """Median time to first token of first and second turns in seconds, one client at a time."""

    async def converse(number: int) -> tuple[Seen, Seen]:
        image = photo(first + number)
        begun = await clients.ask(body(prompt(question(number), None), image, plan.short))
        again = prompt(question(number), begun.text, question(number + 50), None)
        return begun, await clients.ask(body(again, image, plan.short))

    turns = [asyncio.run(converse(number)) for number in range(plan.conversations)]
    return statistics.median(t[0].first for t in turns), statistics.median(t[1].first for t in turns)


@dataclass(frozen=True)
class Measured:
    """Answers, tokens per second with distinct images and with one, and seconds of first and second turns."""

    answers: list[str]
    distinct: float
    one: float
    turns: tuple[float, float]


def measure(clients: Clients, plan: Plan) -> Measured:
    apart = asyncio.run(clients.together(distinct(plan.tokens)))
    same = asyncio.run(clients.together(one_image(plan.tokens)))
    for seen in (*apart, *same):
        assert seen.status == 200 and seen.tokens in (None, plan.tokens), seen
    turns = second_turns(clients, plan, 200)
    return Measured([seen.text for seen in (*apart, *same)], rate(apart, plan.tokens), rate(same, plan.tokens), turns)


def best_threads(chat: Path, plan: Plan) -> int:
    """The number of threads with which the reference serves its five concurrent requests fastest."""
    rates = {}
    for threads in {1, os.cpu_count() or 1}:
        with serving("benchmarks.serve_reference", str(chat), threads=threads) as clients:
            rates[threads] = rate(asyncio.run(clients.together(distinct(plan.short)[:5])), plan.short)
    return max(rates, key=lambda threads: rates[threads])


def overload(chat: Path, plan: Plan) -> tuple[list[Seen], float, float]:
    """Load at twice the capacity: replies, capacity per second, and the longest expected wait in seconds."""
    contents = [body(prompt(question(n), None), photo(300 + n), plan.short) for n in range(plan.arrivals)]
    with serving(*ours(chat, plan.limit, plan.limit)) as clients:
        known = [body(prompt(question(n), None), photo(500 + n), plan.short) for n in range(2 * plan.limit)]
        capacity = rate(asyncio.run(clients.together(known)), 1)
        return asyncio.run(clients.arriving(contents, 2 * capacity)), capacity, 2 * plan.limit / capacity


def quantile(values: Sequence[float], share: float) -> float:
    """The `share` quantile of the values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(plan: Plan, theirs: Measured, mine: Measured, threads: int) -> bool:
    """Print the comparison; returns whether all targets are met."""
    apart, same = mine.distinct / theirs.distinct, mine.one / theirs.one
    first, second = mine.turns
    alike = theirs.answers == mine.answers
    said = f"{len(set(mine.answers))} different answers of {len(mine.answers)}"
    print(f"{CLIENTS} clients, {plan.tokens} new tokens each; {said}, the {'same' if alike else 'OTHERS'} both ways; "
          f"the reference with {threads} threads")  # fmt: skip
    print("| measurement | reference | ours | ours / reference | target |\n|---|---|---|---|---|")
    print(f"| {CLIENTS} clients, an image each | {theirs.distinct:.1f} tokens/s | {mine.distinct:.1f} tokens/s "
          f"| {apart:.1f} | >= 3 |")  # fmt: skip
    print(f"| {CLIENTS} clients, one image | {theirs.one:.1f} tokens/s | {mine.one:.1f} tokens/s "
          f"| {same:.1f} | >= 6 |")  # fmt: skip
    print(f"| first turn, time to the first text | {theirs.turns[0]:.3f} s | {first:.3f} s "
          f"| {first / theirs.turns[0]:.2f} | |")  # fmt: skip
    print(f"| second turn, time to the first text | {theirs.turns[1]:.3f} s | {second:.3f} s "
          f"| {second / theirs.turns[1]:.2f} | |")  # fmt: skip
    print(f"| second turn / first turn | {theirs.turns[1] / theirs.turns[0]:.2f} | {second / first:.2f} | | <= 0.2 |")
    return alike and apart >= 3 and same >= 6 and second <= 0.2 * first


def report_overload(plan: Plan, seen: Sequence[Seen], capacity: float, bound: float) -> bool:
    """Print the outcome of the overload; returns whether the targets are met."""
    waits = [one.first for one in seen if one.status == 200]
    refusals = [one.end for one in seen if one.status == 503]
    print(f"{len(seen)} requests at {2 * capacity:.2f} a second, twice what is served; {plan.limit} places and as many "
          f"that wait: {len(waits)} answered, {len(refusals)} refused")  # fmt: skip
    late = quantile(waits, 0.95)
    print(f"- time to the first text: median {statistics.median(waits):.2f} s, p95 {late:.2f} s, at most "
          f"{max(waits):.2f} s; places and queue take {bound:.2f} s to serve")  # fmt: skip
    if refusals:
        print(f"- refusals: median {1000 * statistics.median(refusals):.1f} ms, p95 "
              f"{1000 * quantile(refusals, 0.95):.1f} ms, at most {1000 * max(refusals):.1f} ms")  # fmt: skip
    return len(waits) + len(refusals) == len(seen) and late <= bound and max(refusals, default=0.0) < 0.05


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: a smoke test whose figures mean nothing")
    parser.add_argument("--threads", type=int, help="threads of the reference (default: the fastest)")
    args = parser.parse_args(argv)
    plan = SMALL if args.quick else FULL
    with tempfile.TemporaryDirectory() as directory:
        chat = make_checkpoint(Path(directory), plan.size)
        make_answers_differ(chat)
        threads = args.threads or best_threads(chat, plan)
        with serving("benchmarks.serve_reference", str(chat), threads=threads) as clients:
            theirs = measure(clients, plan)
        with serving(*ours(chat, CLIENTS)) as clients:
            mine = measure(clients, plan)
        met = report(plan, theirs, mine, threads)
        met &= report_overload(plan, *overload(chat, plan))
    return 0 if met or (args.quick and theirs.answers == mine.answers) else 1


if __name__ == "__main__":
    raise SystemExit(main())
