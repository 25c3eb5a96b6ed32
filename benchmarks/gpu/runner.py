"""Run the parts, each with its own error guard and time limit."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

HARD: Final = 1.5  # a part is stopped after this multiple of its expected time
GRACE: Final = 20.0  # seconds to stop; if it does not (a hung kernel), the process exits
LEAST: Final = 3.0  # no part starts with fewer seconds left


class Skip(Exception):
    """Raised by a part that cannot run here; the message is the reason."""


class PartTimeout(BaseException):
    """Raised inside a part at its time limit. Not an `Exception`, so that guards inside a part do not catch it."""


@dataclass(frozen=True)
class Part:
    """A named group of measurements that should take `seconds` on one GPU."""

    name: str
    seconds: float
    run: Callable[[Bench], None]


class Watchdog:
    """Raise `PartTimeout` in the main thread when a `with` block there takes longer than `seconds`.

    A signal interrupts Python code and waits; a call that never returns from C, such as one on a hung kernel, goes on.
    After `grace` more seconds the watching thread calls `give_up`.
    """

    SIGNAL: Final = signal.SIGUSR1  # not SIGALRM, which pytest-timeout uses

    def __init__(self, seconds: float, grace: float, give_up: Callable[[], None]) -> None:
        self.seconds, self.grace, self.give_up = seconds, grace, give_up
        self._target = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._before = signal.signal(self.SIGNAL, self._interrupt)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop watching. `PartTimeout` may be raised in here; the handler must then call this again."""
        self._ended.set()
        self._thread.join()  # it sends no signal after this
        signal.signal(self.SIGNAL, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._ended.is_set():
            raise PartTimeout

    def _watch(self) -> None:
        if self._ended.wait(self.seconds):
            return
        signal.pthread_kill(self._target, self.SIGNAL)
        if not self._ended.wait(self.grace):
            self.give_up()


def run_parts(parts: Sequence[Part], bench: Bench, deadline: float, grace: float = GRACE) -> None:
    """Run `parts` in order until `deadline` (of `time.monotonic`); the others are recorded as skipped."""
    for number, part in enumerate(parts):
        left = deadline - time.monotonic()
        if left < LEAST:
            for dropped in parts[number:]:
                bench.report.close(dropped.name, "skipped", 0.0, "out of time")
            return
        run_part(part, bench, left, grace)
        bench.tidy()


def run_part(part: Part, bench: Bench, left: float, grace: float) -> None:
    """Run one part for at most `left` seconds, and record its result."""
    start = time.monotonic()
    soft = min(part.seconds, left)
    limit = min(HARD * part.seconds, left)
    print(f"\n{part.name} (at most {soft:.0f} s)", flush=True)
    bench.begin(part.name, start + soft)
    bench.report.begin(part.name)

    def seconds() -> float:
        return time.monotonic() - start

    def give_up() -> None:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        bench.report.close(part.name, "timeout", seconds(), f"hung: did not stop within {limit + grace:.0f} s")
        _leave(bench)

    watchdog = Watchdog(limit, grace, give_up)
    try:
        with watchdog:
            part.run(bench)
    except PartTimeout:
        watchdog.stop()
        bench.report.close(part.name, "timeout", seconds(), f"stopped after {limit:.0f} s")
        bench.release()
    except Skip as reason:
        bench.report.close(part.name, "skipped", seconds(), str(reason))
    except Exception as error:
        bench.report.close(part.name, "failed", seconds(), last_lines(error))
        bench.release()
    else:
        bench.report.close(part.name, "ok", seconds())


def last_lines(error: BaseException, count: int = 8) -> str:
    """The last lines of an error's traceback."""
    text = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(text[-count:])


def _leave(bench: Bench) -> None:
    """End a process whose main thread no longer returns."""
    bench.finish()
    shutil.rmtree(bench.work, ignore_errors=True)
    sys.stdout.flush()
    os._exit(1)


def free_memory(device: torch.device) -> None:
    """Release unused cached memory of the device."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a device error every later call fails
            torch.cuda.empty_cache()
