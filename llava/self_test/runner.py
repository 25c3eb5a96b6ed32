"""The self-test of `llava doctor`: every kind of checkpoint on one device, one line per check."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from llava.self_test import hardware, inference, training
from llava.self_test.checkpoints import KINDS
from llava.self_test.inference import REFERENCE, Case, Role
from llava.self_test.report import Report, isolated, using_threads


def self_test(device: torch.device, write: Callable[[str], None]) -> int:
    """Run all checks on `device`, passing one line per check to `write`; return the number of failures.

    Nothing is downloaded: the models are created in a temporary directory.
    """
    report = Report(write)
    exact, half = Role(device, torch.float32), Role(device, hardware.half_dtype(device))
    with isolated() as threads, tempfile.TemporaryDirectory(prefix="llava-self-test-") as directory:
        check_hardware(report, exact, half, threads)
        for kind in KINDS:
            check_kind(report, kind, Path(directory), exact, half, threads)
        with using_threads(threads):
            check_rates(report, device, half.dtype)
    write(report.summary())
    return report.failed


def check_hardware(report: Report, exact: Role, half: Role, threads: int) -> None:
    device = exact.device
    report.run("device", str(device), lambda: hardware.describe_device(device, threads))
    for role in (exact, half):
        report.run("attention", short(role.dtype), partial(hardware.check_attention, device, role.dtype))
    report.run("C++ kernel", "decoding", partial(hardware.check_native, device))


def check_kind(report: Report, kind: str, root: Path, exact: Role, half: Role, threads: int) -> None:
    """All checks of one kind of checkpoint; only some kinds check sampling, training, quantisation and C++."""
    case = Case(kind, root)
    run = partial(report.run, kind)
    run("loader", lambda: inference.check_loader(case, [REFERENCE, exact, half]))
    if not case.models:  # already reported by the loader check
        return
    run(f"logits {short(exact.dtype)}", lambda: inference.check_logits(case, exact))
    run("greedy tokens", lambda: inference.check_tokens(case, exact))
    run("batch, shared image", lambda: inference.check_batch(case, exact))
    run(f"logits {short(half.dtype)}", lambda: inference.check_logits(case, half))
    if kind in ("llama", "clip") and exact.device.type == "cpu":
        for role in (exact, half):
            run(f"C++ kernel {short(role.dtype)}", partial(hardware.check_native_logits, case, role.dtype, threads))
    if kind in ("llama", "mpt"):
        run("training float32", lambda: training.check_step(case, exact))
        run(f"training {short(half.dtype)}", lambda: training.check_step(case, exact, half.dtype))
    if kind == "llama":
        run("sampling, same seed", lambda: inference.check_seeds(case, exact))
        run("sampling, top_p", lambda: inference.check_top_p(case, exact))
        for bits in (8, 4):
            run(f"{bits}-bit", partial(inference.check_quantized, case, half, bits))


def check_rates(report: Report, device: torch.device, half: torch.dtype) -> None:
    """Rates to compare with the data sheet of the GPU; they never fail."""
    rates: dict[str, Callable[[], str]] = {"copy": partial(hardware.copy_rate, device)}
    if device.type == "cuda":
        rates["copy from host"] = partial(hardware.upload_rate, device)
    for dtype in (half, torch.float32):
        rates[f"matmul {short(dtype)}"] = partial(hardware.matmul_rate, device, dtype)
    for name, measure in rates.items():
        report.run("rate", name, hardware.figure(measure))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
