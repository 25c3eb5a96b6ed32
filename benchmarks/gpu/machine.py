"""Machine description, and the measured ceilings from which floors are computed."""

from __future__ import annotations

import platform
import subprocess
from typing import Any, Final

import torch

from benchmarks.floor import Ceilings
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.timing import free_bytes
from llava.provenance import git_commit, installed_versions

PACKAGES: Final = ("torch", "transformers", "tokenizers", "accelerate", "peft", "deepspeed", "bitsandbytes", "numpy")
LAUNCHES: Final = 1000


def versions(device: torch.device) -> dict[str, Any]:
    """Software, device and commit of this run."""
    found: dict[str, Any] = {**dict.fromkeys(PACKAGES), **installed_versions(PACKAGES), "commit": git_commit()}
    found["device"] = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "device": card.name,
            "memory_gib": round(card.total_memory / GIB, 1),
            "free_gib": round(free_bytes(device) / GIB, 1),
            "multiprocessors": card.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def measure_ceilings(bench: Bench) -> Ceilings:
    """Rates of a large matmul, a device copy, and a copy from pinned host memory."""
    size = 2**24 if bench.quick else min(2 * GIB, free_bytes(bench.device) // 8)
    flops = _product_rate(bench, 512 if bench.quick else 8192)
    return Ceilings(flops, _copy_rate(bench, size), _upload_rate(bench, size // 4))


def _product_rate(bench: Bench, width: int) -> float:
    """FLOP/s of a square matmul of random values; zeros would be faster."""
    left, right = (torch.randn(width, width, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return 2 * width**3 / bench.seconds(lambda: left @ right)


def _copy_rate(bench: Bench, size: int) -> float:
    """Bytes per second read and written."""
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / bench.seconds(lambda: target.copy_(source))


def _upload_rate(bench: Bench, size: int) -> float:
    """Bytes per second from pinned host memory."""
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, pin_memory=bench.cuda)
    target = torch.empty(size, dtype=torch.int8, device=bench.device)
    return size / bench.seconds(lambda: target.copy_(source, non_blocking=True))


def ceilings(bench: Bench) -> Ceilings:
    """The ceilings of this run, measured at the first call."""
    if bench.ceilings is None:
        bench.ceilings = measure_ceilings(bench)
    return bench.ceilings


def launch_seconds(bench: Bench) -> float:
    """Host time per launch in seconds, averaged over 1,000 small operations."""
    x = torch.randn(16, device=bench.device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            x.add_(1.0)

    return bench.seconds(launch, repeats=5, clock=True) / LAUNCHES


def machine(bench: Bench) -> None:
    bench.report.versions = versions(bench.device)
    for name, value in bench.report.versions.items():
        print(f"  {name}: {value}", flush=True)
    found = ceilings(bench)
    kind = str(bench.dtype).removeprefix("torch.")
    bench.line(f"matmul {kind}", found.flops / 1e12, "TFLOP/s")
    bench.line("device copy, reads plus writes", found.bandwidth / 1e12, "TB/s")
    bench.line("copy from pinned host memory", found.pcie / 1e9, "GB/s")
    bench.line("one eager launch", 1e6 * launch_seconds(bench), "µs")
