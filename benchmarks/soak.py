"""Soak test: valid, cancelled and malformed requests against real processes, two of which are killed; finds leaks.

    python -m benchmarks.soak --minutes 30 --requests 2000

Runs a controller and two workers with the tiny model of the tests. One third of the requests is answered, one third
hangs up at a random point, one third is malformed. A worker and the controller are killed (SIGKILL) while streaming
and then restarted. Slots, threads, open files and memory of each idle process are compared before and after. Exits with
status 1 on a leak, on an accepted request without exactly one final frame, or on a reply with status 500.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_requests import API, PATIENCE, STREAM, Call, Draw, Kind, Outcome, send
from tests.serve.programs import Program, program
from tests.tiny import make_all

KINDS: tuple[Kind, ...] = ("whole", "cancelled", "malformed")
LARGEST_BURST = 12
QUIET_SECONDS = 17.0  # a server closes an idle connection after 15
FILES, MIB = 2, 8.0  # noise between idle moments
POOL = min(32, (os.cpu_count() or 1) + 4)  # default size of the thread pool of asyncio
# Return freed memory to the system at once, so that resident memory is memory in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}


@dataclass(frozen=True)
class State:
    """Resources of a process."""

    slots: float
    threads: int
    files: int
    mib: float

    @classmethod
    def of(cls, pid: int, url: str) -> State:
        proc = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        taken = slots(url) if url else 0
        # Its own memory; pages of files come and go as the system likes.
        own = int(status["RssAnon"].split()[0]) / 1024
        return cls(taken, int(status["Threads"]), len(list((proc / "fd").iterdir())), own)

    def leaks(self, before: State) -> list[str]:
        """Resources held beyond `before`."""
        return [
            *([f"{self.slots:g} slots"] if self.slots else []),
            *([f"{self.threads - before.threads} threads"] if self.threads > before.threads + POOL else []),
            *([f"{self.files - before.files} files"] if self.files > before.files + FILES else []),
            *([f"{self.mib - before.mib:.1f} MiB"] if self.mib > before.mib + MIB else []),
        ]


def metrics(url: str) -> str:
    """The text of `/metrics`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=300) as reply:
        return str(reply.read().decode())


def slots(url: str) -> float:
    """Slots in use: requests of a worker, streams of a controller."""
    found = re.findall(r"^llava_(?:requests_in_use|requests_running|streams) (\S+)", metrics(url), re.MULTILINE)
    assert found
    return sum(map(float, found))


@dataclass
class Part:
    """One of the three processes; restarts on the same port after a kill."""

    name: str
    module: str
    words: list[str]
    environment: dict[str, str]
    url: str = ""
    lives: int = 0  # number of kills
    up: bool = False
    before: State | None = None
    logs: list[str] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)
    _program: Program | None = None

    @property
    def program(self) -> Program:
        assert self._program is not None
        return self._program

    def start(self) -> None:
        port = self.url.rpartition(":")[2] or "0"
        made = program(self.environment, self.module, *self.words, "--port", port)
        self._program = self._stack.enter_context(made)
        self.url = self.program.url
        self.up = True

    def kill(self) -> None:
        """Kill with SIGKILL, as the kernel does when memory runs out."""
        self.lives, self.up = self.lives + 1, False
        self.program.stop(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        if self._program is not None:
            self._stack.close()
            self.logs.append(self._program.text)
            self._program = None

    def state(self) -> State:
        return State.of(self.program.process.pid, self.url)


class Soak:
    """The three processes and the outcome of every request."""

    def __init__(self, chat: Path, seed: int) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAVA_")}
        environment |= {
            **MALLOC,
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "*",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.controller = Part("controller", "controller", [], environment)
        words = ["--model-path", str(chat), "--device", "cpu", "--limit-model-concurrency", "4", "--queue-limit", "8"]
        self.workers = [Part(f"worker {n}", "model_worker", list(words), environment) for n in (1, 2)]
        self.draw, self.chance = Draw(seed), random.Random(seed)
        self.accounts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.faults: list[str] = []
        self._flying: set[asyncio.Task[None]] = set()

    @property
    def parts(self) -> list[Part]:
        return [self.controller, *self.workers]

    async def start(self) -> None:
        await asyncio.to_thread(self.controller.start)
        for worker in self.workers:
            worker.words += ["--controller", self.controller.url]
        await asyncio.gather(*(asyncio.to_thread(worker.start) for worker in self.workers))
        await self.listed()

    async def listed(self) -> None:
        """Wait until the controller lists both workers as ready."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ready = re.search(r"^llava_workers (\S+)", await asyncio.to_thread(metrics, self.controller.url), re.M)
            if ready is not None and float(ready[1]) == len(self.workers) and await self._answer() == len(self.workers):
                return
            assert time.monotonic() < deadline, "the controller did not list both workers in time"
            await asyncio.sleep(0.2)

    async def _answer(self) -> int:
        """Number of workers that answer."""
        call = Call("whole", STREAM, self.draw.body(STREAM, long=False))
        outcomes = [await send(worker.url, call) for worker in self.workers]
        return sum(outcome.word == "answered" for outcome in outcomes)

    def fly(self, call: Call, part: Part) -> None:
        """Send without waiting."""
        task = asyncio.ensure_future(self._send(call, part))
        self._flying.add(task)
        task.add_done_callback(self._flying.discard)

    async def landed(self) -> None:
        while self._flying:
            await asyncio.gather(*self._flying)

    async def _send(self, call: Call, part: Part) -> None:
        lives, down = part.lives, not part.up
        outcome = await send(part.url, call)
        if outcome.word in ("broken", "unreachable") and (down or part.lives != lives):
            outcome = Outcome("cut by the kill")  # its process is gone
        self.accounts[call.kind][outcome.word] += 1
        if outcome.word == "unreachable" or outcome.fault:
            self.faults.append(f"{part.name}: {call.kind} {call.what}: {outcome.fault or outcome.word}")

    def random_call(self, number: int) -> tuple[Call, Part]:
        """A request to the controller (two thirds, half of them to the OpenAI API) or to a worker."""
        kind = KINDS[number % len(KINDS)]
        part = self.chance.choice((self.controller, self.controller, self.workers[number % 2]))
        path = API if part is self.controller and self.chance.random() < 0.5 else STREAM
        return self.draw.call(kind, path), part

    async def load(self, first: int, count: int, seconds: float) -> None:
        """Send `count` requests in bursts over `seconds` seconds."""
        start, sent = time.monotonic(), 0
        while sent < count:
            burst = min(self.chance.randint(1, LARGEST_BURST), count - sent)
            for number in range(first + sent, first + sent + burst):
                self.fly(*self.random_call(number))
            sent += burst
            if sent // 100 > (sent - burst) // 100:
                self.say("running")
            await asyncio.sleep(max(0.0, start + seconds * sent / count - time.monotonic()))
        await self.landed()

    async def warm(self, part: Part) -> None:
        """Send every kind of request, several at a time, to fill pools and caches."""
        for round_ in range(24):
            for number in range(6):
                path = API if part is self.controller and round_ % 2 else STREAM
                self.fly(self.draw.call(KINDS[(number + round_) % len(KINDS)], path), part)
            await self.landed()

    async def quiet(self) -> None:
        """Wait until no request runs and idle connections have closed."""
        for _ in range(2):  # the second request drops connections that the first found closed
            await asyncio.sleep(QUIET_SECONDS)
            await self._send(Call("whole", STREAM, self.draw.body(STREAM, long=False)), self.controller)
        deadline = time.monotonic() + 60
        while sum(slots(part.url) for part in self.parts) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        await asyncio.sleep(QUIET_SECONDS)

    async def note(self, parts: Sequence[Part]) -> None:
        """Warm up `parts` and record their resources."""
        await asyncio.gather(*map(self.warm, parts))
        await self.quiet()
        for part in parts:
            part.before = part.state()
        self.say(f"noted {', '.join(part.name for part in parts)}")

    async def kill(self, part: Part) -> None:
        """Kill `part` while it streams, and restart it under load."""
        for _ in range(6):
            self.fly(Call("whole", STREAM, self.draw.body(STREAM, long=True)), part)
        while not await asyncio.to_thread(slots, part.url) and self._flying:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(part.kill)
        await asyncio.to_thread(part.start)

    async def run(self, requests: int, seconds: float) -> list[tuple[Part, State, State]]:
        """Run the soak; returns the resources of each process before and after."""
        await self.start()
        self.say("started")
        await self.note(self.parts)
        third = requests // 3
        for number, victim in enumerate((self.workers[1], self.controller)):
            half = third // 2
            await self.load(number * third, half, seconds * half / requests)
            self.say(f"{victim.name} is killed")
            killing = asyncio.ensure_future(self.kill(victim))
            await self.load(number * third + half, third - half, seconds * (third - half) / requests)
            await killing
            await self.listed()
            self.say(f"{victim.name} is back")
            await self.note([victim])
        await self.load(2 * third, requests - 2 * third, seconds * (requests - 2 * third) / requests)
        await self.quiet()
        return [(part, part.before, part.state()) for part in self.parts if part.before is not None]

    def say(self, what: str) -> None:
        """Print progress."""
        answered = sum(map(Counter.total, self.accounts.values()))
        held = [f"{State.of(part.program.process.pid, '').mib:.0f}" for part in self.parts if part.up]
        print(f"{time.strftime('%H:%M:%S')} {what}; {answered} requests; {', '.join(held)} MiB", flush=True)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def complaints(self) -> list[str]:
        """Tracebacks in the logs."""
        return [f"{part.name}: a traceback in its log" for part in self.parts if "Traceback" in "".join(part.logs)]


def table(rows: Sequence[tuple[Part, State, State]]) -> str:
    """Resources of each idle process before and after, as a table."""
    lines = ["| process | slots in use | threads | open files | private memory |", "|---|---|---|---|---|"]
    for part, before, after in rows:
        lines.append(f"| {part.name} | {before.slots:g}, {after.slots:g} | {before.threads}, {after.threads} "
                     f"| {before.files}, {after.files} | {before.mib:.1f} MiB, {after.mib:.1f} MiB |")  # fmt: skip
    return "\n".join(lines)


async def soak(chat: Path, args: argparse.Namespace) -> list[str]:
    """Run the soak and print the figures; returns what went wrong."""
    run = Soak(chat, args.seed)
    start = time.monotonic()
    try:
        rows = await run.run(args.requests, 60 * args.minutes)
    finally:
        run.close()
    print(f"{args.requests} requests and the warm-ups in {(time.monotonic() - start) / 60:.1f} minutes:")
    for kind, words in run.accounts.items():
        print(f"- {kind}: {words.total()}: " + ", ".join(f"{word} {count}" for word, count in sorted(words.items())))
    print(table(rows))
    leaks = [f"{part.name} leaked {leak}" for part, before, after in rows for leak in after.leaks(before)]
    return [*leaks, *run.faults, *run.complaints()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=30, help="duration of the load, without startup and settling")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the child processes are stopped
    with tempfile.TemporaryDirectory() as directory:
        wrong = asyncio.run(soak(make_all(Path(directory))["chat"], args))
    for line in wrong:
        print(f"WRONG: {line}")
    print("Something leaked or went wrong." if wrong else "Nothing leaked; every accepted request ended in one frame.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
