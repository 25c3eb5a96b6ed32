"""Whole answers: the engine against transformers' `generate`, and many short questions per image."""

from __future__ import annotations

from typing import Any, Final

import torch

from benchmarks.eval import SHAPES, prompts, together, work_of
from benchmarks.floor import answers_seconds, decode_cost, prefill_cost, tower_cost
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.inference import QUESTION, shape
from benchmarks.gpu.machine import ceilings
from benchmarks.gpu.models import SYSTEM, full_model, image_prompt, make_engine, pixels_of, random_ids, random_image
from benchmarks.gpu.timing import wall_seconds
from benchmarks.synthetic import Size
from llava.engine import Request, SamplingParams

POPE: Final = next(shape for shape in SHAPES if shape.name == "POPE")
BATCH: Final = 16


@torch.inference_mode()
def library(bench: Bench, model: Any, rows: list[tuple[list[int], torch.Tensor]], new_tokens: int) -> list[list[int]]:
    """New tokens of transformers' greedy `generate` for prompts of equal length with one image each, in one batch."""
    ids = torch.tensor([row for row, _ in rows], device=bench.device)
    images = torch.stack([image for _, image in rows]).to(bench.device, bench.dtype)
    out = model.generate(
        ids,
        images=images,
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    found: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return found


def generate(bench: Bench) -> None:
    """Tokens per second of `generate` and of the engine for 1 and 16 answers, including image encoding."""
    model = full_model(bench)
    new_tokens, generator = 4 if bench.quick else 32, torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    for count in (1, 2) if bench.quick else (1, 16):
        rows = []
        for _ in range(count):
            before, behind = (random_ids(size, vocabulary, generator) for size in (SYSTEM - 1, QUESTION))
            rows.append((image_prompt(before, behind), random_image(pixels_of(bench), generator)))
        what = f"{count} answer(s) of {new_tokens} tokens"
        if not bench.in_time(what):
            continue
        engine = make_engine(model, max_batch_size=count)
        engine.generate([Request([*rows[0][0][:8], 9], (), SamplingParams(max_new_tokens=4), cache_prefix=False)])
        library(bench, model, rows, 2)
        rate = count * new_tokens / _generation_floor(bench, model, count, new_tokens)
        theirs = wall_seconds(lambda: library(bench, model, rows, new_tokens), bench.device)  # noqa: B023
        params = SamplingParams(max_new_tokens=new_tokens)
        requests = [Request(ids, [image], params, cache_prefix=False) for ids, image in rows]
        ours = wall_seconds(lambda: engine.generate(requests), bench.device)  # noqa: B023
        bench.line(f"{what}, transformers generate", count * new_tokens / theirs, "tokens/s", floor=rate)
        bench.line(f"{what}, engine", count * new_tokens / ours, "tokens/s", floor=rate, note=_ratio(theirs, ours))


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}x as fast"


def _generation_floor(bench: Bench, model: Any, rows: int, new_tokens: int) -> float:
    """Lower bound in seconds of encoding, prefill and decode steps of `rows` answers."""
    size, itemsize = shape(model), bench.dtype.itemsize
    tokens = SYSTEM + size.image_tokens + QUESTION
    phases = [tower_cost(size, rows, itemsize=itemsize), prefill_cost(size, tokens, rows, itemsize=itemsize)]
    phases += [decode_cost(size, rows, tokens + step, itemsize=itemsize) for step in range(1, new_tokens)]
    return sum(phase.seconds(ceilings(bench)) for phase in phases)


def pope(bench: Bench) -> None:
    """18 short questions per image: the engine at batch 16, and `generate` one at a time."""
    model = full_model(bench)
    engine = make_engine(model, max_batch_size=BATCH)
    pixels, images = pixels_of(bench), 1 if bench.quick else 4
    work = work_of(POPE, Size(pixels=pixels), BATCH)
    floor = answers_seconds(shape(model), work, ceilings(bench), itemsize=bench.dtype.itemsize) / POPE.questions
    together(engine, prompts(POPE, -1, pixels), POPE.new_tokens)
    rows = [row for turn in range(images) for row in prompts(POPE, turn, pixels)]
    seconds = wall_seconds(lambda: together(engine, rows, POPE.new_tokens), bench.device) / len(rows)
    what = f"{POPE.questions} questions per image, {POPE.new_tokens} new tokens"
    bench.line(f"{what}, batch {BATCH}", 1 / seconds, "questions/s", floor=1 / floor)
    if not bench.in_time(f"{what}, one at a time"):
        return
    few = rows[: 2 if bench.quick else 12]
    library(bench, model, few[:1], POPE.new_tokens)

    def one_at_a_time() -> None:
        for row in few:
            library(bench, model, [row], POPE.new_tokens)

    alone = wall_seconds(one_at_a_time, bench.device) / len(few)
    bench.line(f"{what}, one at a time with transformers generate", 1 / alone, "questions/s")
    bench.line(f"{what}: batch {BATCH} against one at a time", alone / seconds, "x")
