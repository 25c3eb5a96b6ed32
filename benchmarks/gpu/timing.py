"""Times by CUDA events, peak memory, and launches and synchronisations of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import peak_mib

_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # the profiler itself waits for the whole device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: between two events on CUDA, by the clock on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def median_seconds(
    work: Callable[[], object],
    device: torch.device,
    *,
    warmup: int = 2,
    repeats: int = 20,
    budget: float = 2.0,
    clock: bool = False,
) -> float:
    """Median seconds per call after `warmup` calls, over 3 to `repeats` calls within about `budget` seconds.

    `clock` measures wall time between synchronisations, for work that involves the host.
    """
    for _ in range(warmup):
        work()
    synchronize(device)
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < repeats and (len(found) < 3 or time.perf_counter() - start < budget):
        found.append(wall_seconds(work, device) if clock else seconds_of(work, device))
    return median(found)


def wall_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds until the device has finished."""
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, including memory cached by PyTorch's allocator."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory of tensors since `reset_peak`; on the CPU, peak resident memory of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else int(peak_mib() * 2**20)


@dataclass(frozen=True)
class Trace:
    """Profile of one call: kernels and copies, their seconds on the device, and host synchronisations."""

    launches: float
    busy_seconds: float
    waits: float


def trace(work: Callable[[], object], device: torch.device, calls: int = 2) -> Trace | None:
    """Means over `calls`; None if the profiler records no kernels."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            work()
    events: list[Any] = list(profiler.events() or ())
    on_device = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if all(event.name.startswith(("Memcpy", "Memset")) for event in on_device):
        return None
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
    waits = sum(event.name in _WAITS for event in events)
    return Trace(len(on_device) / calls, busy / calls, waits / calls)
