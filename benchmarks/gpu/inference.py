"""Model creation, vision tower, prefill and decode steps, each against its floor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, Final

import torch

from benchmarks.counting import OpCounter
from benchmarks.floor import column_bytes, decode_cost, prefill_cost, tower_cost
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.machine import ceilings
from benchmarks.gpu.models import (
    SYSTEM,
    full_model,
    image_prompt,
    make_engine,
    pixels_of,
    random_ids,
    random_image,
    weight_count,
)
from benchmarks.gpu.runner import free_memory
from benchmarks.gpu.timing import free_bytes, peak_bytes, reset_peak, synchronize, trace, wall_seconds
from llava.engine import Engine, Request, SamplingParams
from llava.train.flops import Shape, shape_of

GREEDY: Final = {"greedy": SamplingParams(max_new_tokens=64)}
SAMPLED: Final = {"top_p": SamplingParams(max_new_tokens=64, temperature=0.7, top_p=0.9, seed=1)}
QUESTION: Final = 64  # tokens after the image
STEPS: Final = 4  # decode steps timed together, so that steps can overlap
CACHE_ROOM: Final = 3.0  # a growing KV buffer plus its predecessor, as a multiple of the cached tokens


def weights(bench: Bench) -> None:
    """Model creation time, and peak memory against weight size."""
    bench.release()
    reset_peak(bench.device)
    start = time.perf_counter()
    model = full_model(bench)
    synchronize(bench.device)
    seconds = time.perf_counter() - start
    count = sum(parameter.numel() for parameter in model.parameters())
    bench.line(f"{count / 1e9:.1f} B random weights created on the device", seconds, "s")
    size = count * bench.dtype.itemsize
    if bench.cuda:
        bench.line("peak memory of creation", peak_bytes(bench.device) / GIB, "GiB", predicted=size / GIB)
    else:
        bench.line("memory of the weights", size / GIB, "GiB", predicted=weight_count(shape(model)) * 4 / GIB)


def shape(model: Any) -> Shape:
    return shape_of(model.config, model.get_vision_tower())


def prefill(bench: Bench) -> None:
    """The tower at two resolutions, and prompts through the engine."""
    model = full_model(bench)
    _tower(bench, model)
    engine = make_engine(model, max_batch_size=16)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    cases = ((32, 1), (16, 4)) if bench.quick else ((640, 1), (1088, 1), (640, 16))
    for tokens, rows in cases:
        what = f"prefill of {rows} x {tokens} tokens" if rows > 1 else f"prefill of {tokens} tokens"
        if not bench.in_time(what):
            continue

        def run(tokens: int = tokens, rows: int = rows) -> None:
            prompts = [random_ids(tokens, vocabulary, generator) for _ in range(rows)]
            engine.generate(
                [Request(ids, params=SamplingParams(max_new_tokens=1), cache_prefix=False) for ids in prompts]
            )

        floor = prefill_cost(shape(model), tokens, rows, itemsize=bench.dtype.itemsize).seconds(ceilings(bench))
        seconds = bench.seconds(run, repeats=10, clock=True)
        bench.line(f"{what}, through the engine", 1000 * seconds, "ms", floor=1000 * floor)
        if rows == 1:
            _launches(bench, what, run, seconds)


def _tower(bench: Bench, model: Any) -> None:
    sizes = (56, 112) if bench.quick else (336, 448)
    for pixels, images in ((sizes[0], 1), (sizes[0], 16), (sizes[1], 1)):
        what = f"tower and projector, {images} image(s) of {pixels} px"
        if not bench.in_time(what):
            continue
        patches = (pixels // 14) ** 2
        at_size = replace(shape(model), tower_positions=patches + 1, image_tokens=patches)
        batch = torch.randn(images, 3, pixels, pixels, device=bench.device, dtype=bench.dtype)

        @torch.inference_mode()
        def encode(batch: torch.Tensor = batch) -> None:
            model.encode_images(batch)

        floor = tower_cost(at_size, images, itemsize=bench.dtype.itemsize).seconds(ceilings(bench))
        seconds = bench.seconds(encode)
        bench.line(what, 1000 * seconds, "ms", floor=1000 * floor)
        if images == 1 and pixels == sizes[0]:
            _launches(bench, what, encode, seconds)


def decode(bench: Bench) -> None:
    """Decode steps of 1, 16 and 64 rows with separate or shared prefixes, greedy and sampled."""
    model = full_model(bench)
    for rows in (1, 2) if bench.quick else (1, 16, 64):
        free_memory(bench.device)  # of the previous engine
        engine = make_engine(model, max_batch_size=rows)
        for shared in (False, True) if rows > 1 else (False,):
            for sampling, params in (GREEDY | SAMPLED).items():
                kind = "one shared image" if shared else "separate prefixes"
                what = f"decode step, {rows} row(s), {kind}, {sampling}"
                if bench.in_time(what) and _cache_fits(bench, model, rows, what):
                    _decode(bench, engine, rows, shared, params, what)


def _cache_fits(bench: Bench, model: Any, rows: int, what: str) -> bool:
    """Whether keys and values of `rows` fit in memory; if not, record a skip."""
    tokens = rows * (SYSTEM + QUESTION + shape(model).image_tokens)
    needed = tokens * column_bytes(shape(model), bench.dtype.itemsize) * CACHE_ROOM
    free = free_bytes(bench.device)
    if free < needed:
        bench.skip(what, f"its KV cache needs {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free")
    return free >= needed


def _decode(bench: Bench, engine: Engine, rows: int, shared: bool, params: SamplingParams, what: str) -> None:
    """Fill the batch, time its steps, and count the launches and synchronisations of one step."""
    handles = [engine.submit(request) for request in decode_requests(bench, engine.model, rows, shared, params)]
    for _ in range(3):
        engine.step()
    if engine.running < rows:
        bench.skip(what, f"the engine's KV cache holds only {engine.running} of the rows at a time")
    else:
        _time_decode(bench, engine, rows, shared, what)
    for handle in handles:
        handle.cancel()
    while engine.step():
        pass


def _time_decode(bench: Bench, engine: Engine, rows: int, shared: bool, what: str) -> None:
    size = shape(engine.model)
    prefix, own = SYSTEM + size.image_tokens, QUESTION

    def steps() -> None:
        for _ in range(STEPS):
            engine.step()

    seconds = _median_step(steps, bench)
    if not shared:
        prefix, own = 0, prefix + own
    itemsize = bench.dtype.itemsize
    floor = decode_cost(size, rows, own + 3 * STEPS, prefix, itemsize=itemsize).seconds(ceilings(bench))
    bench.line(what, 1000 * seconds, "ms", floor=1000 * floor)
    _launches(bench, what, engine.step, seconds, predicted=1)


def _median_step(steps: Callable[[], None], bench: Bench) -> float:
    """Median seconds per step over groups of `STEPS` steps, measured for about two seconds."""
    steps()
    synchronize(bench.device)
    found: list[float] = []
    start = time.perf_counter()
    budget = 0.0 if bench.quick else 2.0
    while len(found) < 8 and (len(found) < 2 or time.perf_counter() - start < budget):
        found.append(wall_seconds(steps, bench.device) / STEPS)
    return median(found)


def decode_requests(bench: Bench, model: Any, rows: int, shared: bool, params: SamplingParams) -> list[Request]:
    """Prompts as long as an image and a question: separate random prompts, or a shared image."""
    generator = torch.Generator().manual_seed(rows)
    vocabulary, image_tokens = model.config.vocab_size, shape(model).image_tokens
    if not shared:
        count = SYSTEM + image_tokens + QUESTION
        return [Request(random_ids(count, vocabulary, generator), (), params, cache_prefix=False) for _ in range(rows)]
    before, image = random_ids(SYSTEM - 1, vocabulary, generator), random_image(pixels_of(bench), generator)
    questions = [random_ids(QUESTION, vocabulary, generator) for _ in range(rows)]
    return [Request(image_prompt(before, behind), [image], params, cache_prefix=False) for behind in questions]


def _launches(bench: Bench, what: str, work: Callable[[], object], seconds: float, **waits: Any) -> None:
    """Launches of one call against the operator count, GPU busy fraction, and host synchronisations.

    `waits` may hold the `predicted` number of synchronisations.
    """
    with OpCounter(bench.device.type) as counter:
        work()
    if not bench.cuda:
        bench.line(f"{what}: launches", counter.launches)
        return
    found = trace(work, bench.device)
    if found is None:
        bench.skip(f"{what}: launches", "the profiler recorded no kernels")
        return
    bench.line(f"{what}: launches", round(found.launches), predicted=counter.launches)
    bench.line(f"{what}: busy fraction", 100 * min(1.0, found.busy_seconds / seconds), "%")
    bench.line(f"{what}: synchronisations", round(found.waits, 1), **waits)
