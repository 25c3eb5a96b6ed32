"""Run all checks of every kind of checkpoint on one device, and report one line each."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers.utils import logging as library_logging

from llava.model.multimodal_encoder.tower import ENVIRONMENT as TOWER_VARIABLE
from llava.self_test import CheckFailed, CheckSkipped, checks, hardware
from llava.self_test.checkpoints import KINDS
from llava.self_test.checks import REFERENCE, Case, Role
from llava.self_test.hardware import using_threads


@dataclass
class Report:
    """Runs checks and writes `status subject check result` in columns."""

    write: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.perf_counter)

    def run(self, subject: str, name: str, check: Callable[[], str], *, required: bool = True) -> None:
        """Run `check`, which returns its result as text.

        An exception is a failure, or a skip unless `required`; later checks still run.
        """
        try:
            status, result = "ok", check()
        except (CheckFailed, CheckSkipped) as outcome:
            status, result = "FAIL" if isinstance(outcome, CheckFailed) else "skip", str(outcome)
        except Exception as error:  # the device and its libraries may raise anything
            status, result = ("FAIL", "") if required else ("skip", "not measured: ")
            result += f"{type(error).__name__}: {error}"
        self.counts[status] += 1
        self.write(f"{status:<6}{subject:<14}{name:<22}{' '.join(result.split())}")

    def summary(self) -> str:
        ok, failed, skipped = (self.counts[status] for status in ("ok", "FAIL", "skip"))
        seconds = time.perf_counter() - self.started
        return f"{ok + failed} checks, {failed} failed{f', {skipped} skipped' if skipped else ''} ({seconds:.0f} s)"


@contextmanager
def isolated() -> Iterator[int]:
    """Disable TF32, use one thread, and restore global state (random state included) afterwards.

    The models are too small to gain from several threads. Yields the previous thread count.
    """
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    dtype, verbosity = torch.get_default_dtype(), library_logging.get_verbosity()
    try:
        with (
            using_threads(1) as threads,
            patch.dict(os.environ),
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
        ):
            os.environ.pop(TOWER_VARIABLE, None)  # would override the tower of every checkpoint
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            library_logging.set_verbosity_error()
            yield threads
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
        library_logging.set_verbosity(verbosity)


def self_test(device: torch.device, write: Callable[[str], None]) -> int:
    """Run all checks on `device`, passing one line per check to `write`, and return the number of failures.

    Creates the models in a temporary directory; downloads nothing.
    """
    report = Report(write)
    exact, half = Role(device, torch.float32), Role(device, hardware.half_dtype(device))
    with isolated() as threads, tempfile.TemporaryDirectory(prefix="llava-self-test-") as directory:
        report.run("device", str(device), lambda: hardware.describe_device(device, threads))
        for role in (exact, half):
            report.run("attention", short(role.dtype), partial(hardware.check_attention, device, role.dtype))
        report.run("C++ kernel", "decoding", lambda: hardware.check_native(device))
        for kind in KINDS:
            check_kind(report, kind, Path(directory), exact, half, threads)
        with using_threads(threads):
            check_rates(report, device, half.dtype)
    write(report.summary())
    return report.counts["FAIL"]


def check_kind(report: Report, kind: str, root: Path, exact: Role, half: Role, threads: int) -> None:
    """All checks of one kind of checkpoint; only some kinds check sampling, training, quantization and C++."""
    case = Case(kind, root)
    run = partial(report.run, kind)
    run("loader", lambda: checks.check_loader(case, [REFERENCE, exact, half]))
    if not case.models:  # reported by the loader check
        return
    run(f"logits {short(exact.dtype)}", lambda: checks.check_logits(case, exact))
    run("greedy tokens", lambda: checks.check_tokens(case, exact))
    run("batch, shared image", lambda: checks.check_batch(case, exact))
    run(f"logits {short(half.dtype)}", lambda: checks.check_logits(case, half))
    if kind in ("llama", "clip") and exact.device.type == "cpu":
        for role in (exact, half):
            run(f"C++ kernel {short(role.dtype)}", partial(hardware.check_native_logits, case, role.dtype, threads))
    if kind in ("llama", "mpt"):
        run("training float32", lambda: checks.check_step(case, exact))
        run(f"training {short(half.dtype)}", lambda: checks.check_step(case, exact, half.dtype))
    if kind == "llama":
        run("sampling, same seed", lambda: checks.check_seeds(case, exact))
        run("sampling, top_p", lambda: checks.check_top_p(case, exact))
        for bits in (8, 4):
            run(f"{bits}-bit", partial(checks.check_quantized, case, half, bits))
            if exact.device.type == "cpu":
                run(f"C++ kernel {bits}-bit", partial(hardware.check_native_logits, case, half.dtype, threads, bits))


def check_rates(report: Report, device: torch.device, half: torch.dtype) -> None:
    """Rates to compare with the data sheet of the GPU; they never fail."""
    run = partial(report.run, "rate", required=False)
    run("copy", lambda: hardware.copy_rate(device))
    if device.type == "cuda":
        run("copy from host", lambda: hardware.copy_rate(device, from_host=True))
    for dtype in (half, torch.float32):
        run(f"matmul {short(dtype)}", partial(hardware.matmul_rate, device, dtype))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
