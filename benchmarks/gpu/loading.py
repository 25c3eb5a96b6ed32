"""Loading a checkpoint from disk onto the GPU, in 16-bit precision and quantised to 8-bit and 4-bit."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.floor import decode_cost, load_cost
from benchmarks.full_size import FULL, make_model
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.inference import GREEDY, QUESTION, decode_requests, shape
from benchmarks.gpu.machine import ceilings
from benchmarks.gpu.models import QUICK, SYSTEM, full_tokenizer, make_engine, pixels_of
from benchmarks.gpu.runner import Skip, free_memory
from benchmarks.gpu.timing import peak_bytes, reset_peak, wall_seconds
from llava.model.builder import load_pretrained_model

SIX_GB: Final = replace(FULL, layers=7, tower_layers=13)  # 10 layers of the tower are used
# Largest relative error of logits against the same weights in 16-bit precision.
ERROR: Final = {8: 0.1, 4: 0.5}


def checkpoint(bench: Bench) -> Path:
    """A 6 GB chat checkpoint including its tower, written at the first call."""
    directory = bench.work / "chat"
    if directory.is_dir():
        return directory
    bench.release()
    size = QUICK if bench.quick else SIX_GB
    bench.require_memory(0 if bench.quick else 7e9, "the checkpoint to write")
    if not bench.quick and shutil.disk_usage(bench.work).free < 7e9:
        raise Skip(f"the checkpoint needs 7 GB of free disk space at {bench.work}")
    torch.manual_seed(0)
    model = make_model(bench.device, bench.dtype, pixels=pixels_of(bench), size=size)
    model.save_pretrained(directory, max_shard_size="20GB")
    full_tokenizer(size.vocabulary).save_pretrained(directory)
    return directory


def load(bench: Bench, **options: Any) -> Any:
    loaded = load_pretrained_model(checkpoint(bench), device=str(bench.device), dtype=bench.dtype, **options)
    return loaded[1]


def loading(bench: Bench) -> None:
    """Load time from the page cache to the device, against the copy from pinned memory."""
    directory = checkpoint(bench)
    free_memory(bench.device)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    floor, found = load_cost(size, ceilings(bench)), []
    for turn in range(3):
        what = f"load {size / 1e9:.2g} GB from the page cache"
        if turn and not bench.in_time(what):
            break
        reset_peak(bench.device)
        found.append(wall_seconds(lambda: load(bench), bench.device))
        free_memory(bench.device)
    bench.line(what, min(found), "s", floor=floor, note=f"first {found[0]:.2f} s")
    if bench.cuda:
        bench.line("peak memory of loading", peak_bytes(bench.device) / GIB, "GiB", predicted=size / GIB)


def quantized(bench: Bench) -> None:
    """8-bit and 4-bit: load time, memory, decode steps, and logits against 16-bit precision."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    model = load(bench)
    expected = _logits(bench, model)
    _decode(bench, model, 16)
    weights = model.config, [parameter.nbytes for parameter in model.parameters()]
    del model
    for bits in (8, 4):
        if not bench.in_time(f"{bits}-bit"):
            continue
        free_memory(bench.device)
        before = _allocated(bench)
        reset_peak(bench.device)
        packed: list[Any] = []
        options = {f"load_{bits}bit": True}
        seconds = wall_seconds(lambda: packed.append(load(bench, **options)), bench.device)  # noqa: B023
        bench.line(f"{bits}-bit: load", seconds, "s")
        if bench.cuda:
            held, peak = (_allocated(bench) - before) / GIB, (peak_bytes(bench.device) - before) / GIB
            bench.line(f"{bits}-bit: memory", held, "GiB", note=f"{sum(weights[1]) / GIB:.3g} GiB in 16-bit precision")
            bench.line(f"{bits}-bit: peak memory of loading", peak, "GiB")
        found = _logits(bench, packed[0])
        error = ((found - expected).norm() / expected.norm()).item()
        bench.check(f"{bits}-bit: logits, relative error", error < ERROR[bits], f"{error:.3f}", f"below {ERROR[bits]}")
        _decode(bench, packed.pop(), bits)


def _allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated(bench.device) if bench.cuda else 0


@torch.inference_mode()
def _logits(bench: Bench, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, model.config.vocab_size, (2, 32), generator=generator)
    logits: torch.Tensor = model(ids.to(bench.device)).logits
    return logits.float()


def _decode(bench: Bench, model: Any, bits: int) -> None:
    """Time a decode step of one row, against the 16-bit floor."""
    engine = make_engine(model, max_batch_size=1)
    params = GREEDY["greedy"]
    handle = engine.submit(decode_requests(bench, model, 1, False, params)[0])
    engine.step()
    seconds = bench.seconds(engine.step, repeats=10, clock=True)
    handle.cancel()
    size = shape(model)
    tokens, itemsize = SYSTEM + size.image_tokens + QUESTION, bench.dtype.itemsize
    floor = decode_cost(size, 1, tokens, itemsize=itemsize).seconds(ceilings(bench))
    label = "16-bit precision" if bits == 16 else "16-bit floor"
    bench.line(f"{bits}-bit: decode step, 1 row", 1000 * seconds, "ms", predicted=1000 * floor, note=label)
