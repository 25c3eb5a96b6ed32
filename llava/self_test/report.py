"""Print one line per check as it finishes, and a summary."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.utils import logging as library_logging

from llava.model.multimodal_encoder.tower import ENVIRONMENT as TOWER_VARIABLE


class CheckFailed(Exception):
    """A check failed; the message says what was found and what was expected."""


class CheckSkipped(Exception):
    """A check does not apply here; the message says why."""


@dataclass
class Report:
    """Runs checks and writes `status subject check result` in columns."""

    write: Callable[[str], None]
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    started: float = field(default_factory=time.perf_counter)

    def run(self, subject: str, name: str, check: Callable[[], str]) -> None:
        """Run `check`, which returns its result as text. An exception is reported and later checks still run."""
        try:
            status, result = "ok", check()
            self.passed += 1
        except CheckSkipped as reason:
            status, result = "skip", str(reason)
            self.skipped += 1
        except Exception as error:  # the device and its libraries may raise anything
            expected = isinstance(error, CheckFailed)
            status, result = "FAIL", str(error) if expected else f"{type(error).__name__}: {error}"
            self.failed += 1
        self.write(f"{status:<6}{subject:<14}{name:<22}{' '.join(result.split())}")

    def summary(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        seconds = time.perf_counter() - self.started
        return f"{self.passed + self.failed} checks, {self.failed} failed{skipped} ({seconds:.0f} s)"


def within(errors: Sequence[float], limit: float) -> str:
    """The largest of `errors` and its limit as text. Raises `CheckFailed` when it exceeds the limit or is NaN."""
    largest = max(errors, key=lambda error: (math.isnan(error), error))
    text = f"relative error {largest:.1e}, limit {limit:.0e}"
    if not largest <= limit:
        raise CheckFailed(text)
    return text


@contextmanager
def isolated() -> Iterator[int]:
    """Disable TF32, use one thread, and restore global state (random state included) afterwards.

    The models are too small for several threads to pay off on a busy machine. Yields the previous thread count.
    """
    threads = torch.get_num_threads()
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    dtype, verbosity = torch.get_default_dtype(), library_logging.get_verbosity()
    tower = os.environ.pop(TOWER_VARIABLE, None)  # it would override every tower
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            library_logging.set_verbosity_error()
            torch.set_num_threads(1)
            yield threads
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
        library_logging.set_verbosity(verbosity)
        if tower is not None:
            os.environ[TOWER_VARIABLE] = tower


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Use `count` threads, then restore the previous count."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
