"""The device, its attention kernels, the C++ kernel, and copy and matmul rates."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from unittest.mock import patch

import torch

from llava.engine.attention import select_kernel
from llava.engine.native.build import find_compiler, has_tiles, library
from llava.placement import native_decode_rows, resolve_attention, resolve_dtype
from llava.self_test import CheckFailed, CheckSkipped, checks, within
from llava.self_test.checks import REFERENCE, Case, Role

HEAD_DIM: Final = 128  # of the published models
SECONDS: Final = 0.3  # to measure each rate for


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit dtype to use on `device`."""
    return torch.bfloat16 if device.type == "cpu" else resolve_dtype(device, None, torch.bfloat16)


def describe_device(device: torch.device, threads: int) -> str:
    """Name and properties of the device, and the torch version."""
    text = platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        text = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
    elif device.type == "cpu":
        text = f"{text}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return f"{text}, torch {torch.__version__}"


def check_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Attention kernels of the engine, without and with a mask, and of the model outside the engine."""
    names = [select_kernel(device, dtype, HEAD_DIM, masked=masked)[1] for masked in (False, True)]
    return f"engine {', masked '.join(dict.fromkeys(names))}; model {resolve_attention(device, dtype)}"


def check_native(device: torch.device) -> str:
    """Whether decoding runs in the C++ kernel (CPU only)."""
    if device.type != "cpu":
        raise CheckSkipped("only used on the CPU")
    if os.environ.get("LLAVA_NATIVE", "1") == "0":
        raise CheckSkipped("not used: disabled by LLAVA_NATIVE=0")
    if sys.platform != "linux":
        raise CheckSkipped("not used: Linux only")
    compiler = find_compiler()
    if compiler is None:
        raise CheckSkipped("not used: no C++ compiler found; install g++ or clang")
    if library() is None:
        raise CheckFailed(f"{compiler} could not build it; see the warning above")
    tiles = ", with AMX for bfloat16" if has_tiles() else ""
    return f"in use for up to {native_decode_rows(torch.float32)} rows{tiles}, built by {compiler}"


def check_native_logits(case: Case, dtype: torch.dtype, threads: int, bits: int = 0) -> str:
    """Several batch sizes through the C++ kernel, sharing an image, against the forward of transformers.

    With `bits`, both use quantized layers: the kernel must reproduce the matrix products of bitsandbytes.
    """
    role, errors, sizes = Role(REFERENCE.device, dtype), [], [1, 3, native_decode_rows(dtype)]
    if bits:
        checks.require_package("bitsandbytes", "quant")
    loaded = case.load(role, bits=bits) if bits else case.models[role]
    reference = loaded if bits else case.models[REFERENCE]
    for size in sizes:
        engine = checks.make_engine(loaded, max_batch_size=size)
        native = getattr(engine.model_runner, "native", None)
        if native is None:
            raise CheckSkipped("the C++ kernel is not in use")
        requests = checks.make_requests(size, new_tokens=4)
        with using_threads(threads), patch.object(native, "step", wraps=native.step) as step:
            errors.append(checks.engine_error(engine, reference, requests))
        if step.call_count == 0:
            raise CheckFailed(f"a batch of {size} was not decoded by the C++ kernel")
    return f"{within(errors, checks.LIMITS[dtype])}, {', '.join(map(str, sizes))} rows"


def copy_rate(device: torch.device, *, from_host: bool = False) -> str:
    """Bandwidth of a copy on the device (reads plus writes), or of one from pinned host memory."""
    size = 2**26 if device.type != "cuda" else 2**28 if from_host else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=None if from_host else device, pin_memory=from_host)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), device)
    return f"{size / seconds / 1e9:.1f} GB/s" if from_host else f"{2 * size / seconds / 1e9:.0f} GB/s"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> str:
    """Throughput of a square matmul; float32 runs without TF32."""
    side = 1024 if device.type == "cpu" else 8192 if dtype != torch.float32 else 4096
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return f"{2 * side**3 / seconds_of(lambda: torch.mm(left, right, out=out), device) / 1e12:.2f} TFLOP/s"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the fastest of the calls within `SECONDS`."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    best, end = float("inf"), time.perf_counter() + SECONDS
    work()
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def using_threads(count: int) -> Iterator[int]:
    """Use `count` threads, and restore the previous count, which is yielded."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
