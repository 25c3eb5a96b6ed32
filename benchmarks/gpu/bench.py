"""State shared by the parts of a run: the device, the measured ceilings, the model, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import Ceilings
from benchmarks.gpu.report import Line, Report
from benchmarks.gpu.runner import Skip, free_memory
from benchmarks.gpu.timing import free_bytes, median_seconds

GIB = 2**30


class Bench:
    """One run on `device`, at toy sizes if `quick`.

    `golden` is the golden data directory or None, `work` a directory that is deleted afterwards. `ceilings` and `model`
    are set by the first part that needs them. Measurements use the 16-bit dtype of the GPU, or float32 on the CPU.
    """

    def __init__(self, device: torch.device, report: Report, work: Path, *, quick: bool, golden: Path | None) -> None:
        self.device, self.report, self.work, self.quick, self.golden = device, report, work, quick, golden
        self.dtype = torch.float32
        if device.type == "cuda":
            self.dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        self.ceilings: Ceilings | None = None
        self.model: Any = None
        self._part, self._deadline = "", 0.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def begin(self, part: str, deadline: float) -> None:
        """Assign later lines to `part`, which should end by `deadline`."""
        self._part, self._deadline = part, deadline

    def left(self) -> float:
        """Seconds left of the part's time."""
        return self._deadline - time.monotonic()

    def line(self, what: str, value: float | str, unit: str = "", **more: Any) -> None:
        """Record a measurement; `more` are the other fields of `Line`."""
        self.report.add(self._part, Line(what, value, unit, **more))

    def check(self, what: str, good: bool, value: float | str, note: str = "") -> None:
        """Record whether a result is right; `note` names the tolerance."""
        self.report.add(self._part, Line(what, value, ok=bool(good), note=note))

    def skip(self, what: str, reason: str) -> None:
        """Record that `what` was not measured."""
        self.report.add(self._part, Line(what, note=reason))

    def in_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether at least `seconds` of the part's time are left; if not, record `what` as not measured."""
        if self.left() > seconds:
            return True
        self.skip(what, "the part reached its time limit")
        return False

    def seconds(self, work: Callable[[], object], *, repeats: int = 20, clock: bool = False) -> float:
        """Median seconds of a call, see `median_seconds`."""
        if self.quick:
            return median_seconds(work, self.device, warmup=1, repeats=3, budget=0.0, clock=clock)
        return median_seconds(work, self.device, repeats=repeats, clock=clock)

    def require_memory(self, needed: float, what: str) -> None:
        """Skip the part if fewer than `needed` bytes are free on the device."""
        free = free_bytes(self.device)
        if free < needed:
            raise Skip(f"{what} needs {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free")

    def release(self) -> None:
        """Free the model."""
        self.model = None
        free_memory(self.device)

    def tidy(self) -> None:
        """Free everything but the model."""
        free_memory(self.device)

    def finish(self) -> None:
        """Print the table and the summary."""
        print(f"\n{self.report.table()}\n", *self.report.remarks(), sep="\n", flush=True)
