"""Engine answers against transformers' `generate`, one at a time, in float32 on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.golden import exact_float32
from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine import Engine, Request, SamplingParams
from llava.model.builder import load_pretrained_model

TIE: Final = 1e-3  # logits closer than this may swap under another summation order
PIXELS: Final = 56
Row = tuple[list[int], list[Tensor]]
Answer = tuple[list[int], Tensor | None]


def lively_model(bench: Bench) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of a tiny checkpoint with large weights, so all tokens affect the logits."""
    from tests.tiny import make_chat, make_tower

    tower, chat = bench.work / "lively-tower", bench.work / "lively-chat"
    if not chat.is_dir():
        make_tower(tower)
        make_chat(chat, tower, initializer_range=0.25, hidden_size=64)
    tokenizer, model, processor, _ = load_pretrained_model(chat, device=str(bench.device), dtype=torch.float32)
    return model, tokenizer, processor


def mixed_rows(count: int, seed: int) -> list[Row]:
    """Prompts of very different lengths, with no, one or two images."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for number in range(count):
        ids = torch.randint(260, 380, (3 + 7 * number % 60,), generator=generator).tolist()
        images = [torch.randn(3, PIXELS, PIXELS, generator=generator) for _ in range(number % 3)]
        for at in range(len(images)):
            ids.insert(at + 1, IMAGE_TOKEN_INDEX)
        rows.append(([1, *ids], images))
    return rows


def shared_rows(count: int, seed: int) -> list[Row]:
    """Questions of different lengths about one image after one system prompt."""
    generator = torch.Generator().manual_seed(seed)
    system = torch.randint(260, 380, (40,), generator=generator).tolist()
    image = torch.randn(3, PIXELS, PIXELS, generator=generator)
    questions = [torch.randint(260, 380, (4 + number,), generator=generator).tolist() for number in range(count)]
    return [([1, *system, IMAGE_TOKEN_INDEX, *question], [image]) for question in questions]


@torch.inference_mode()
def alone(model: Any, row: Row, params: SamplingParams) -> Answer:
    """New tokens of `generate` for one prompt and, without beams, their logits (tokens, V)."""
    ids, images = row
    greedy = params.num_beams == 1
    out = model.generate(
        torch.tensor([ids], device=model.device),
        images=torch.stack(images).to(model.device) if images else None,
        do_sample=False,
        num_beams=params.num_beams,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=2,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=greedy,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.scores) if greedy else None


def compare(engine: Engine, rows: Sequence[Row], answers: Sequence[Answer], params: SamplingParams) -> tuple[int, int]:
    """Number of wrong engine answers, and of answers that differ only after tied logits."""
    requests = [Request(ids, images, params) for ids, images in rows]
    wrong = ties = 0
    for (expected, logits), done in zip(answers, engine.generate(requests)):
        found = list(done.token_ids)
        if found == expected:
            continue
        if logits is not None and _is_tie(found, expected, logits):
            ties += 1
        else:
            wrong += 1
    return wrong, ties


def _is_tie(found: list[int], expected: list[int], logits: Tensor) -> bool:
    """Whether the first differing tokens have equal logits up to rounding."""
    at = next((k for k, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), None)
    if at is None:
        return False
    step = logits[at]
    return bool((step[expected[at]] - step[found[at]]).abs() < TIE * step.abs().max())


def engine_equals_generate(bench: Bench) -> None:
    count, tokens = (4, 6) if bench.quick else (24, 32)
    greedy = SamplingParams(max_new_tokens=tokens)
    with exact_float32():
        model, tokenizer, processor = lively_model(bench)
        for what, rows in (("mixed lengths", mixed_rows(count, 1)), ("one shared prefix", shared_rows(count, 2))):
            if bench.in_time(what):
                engine = Engine(model, tokenizer, processor, max_batch_size=8)
                answers = [alone(model, row, greedy) for row in rows]
                first = compare(engine, rows, answers, greedy)
                _report(bench, f"engine equals generate: {what}", len(rows), *first)
                again = compare(engine, rows[::-1], answers[::-1], greedy)
                _report(bench, f"engine equals generate: {what}, prefixes cached", len(rows), *again)
        engine = Engine(model, tokenizer, processor, max_batch_size=8)
        rows = shared_rows(3, 3)  # transformers' beam search takes one image per row
        beams = replace(greedy, num_beams=3)
        found = compare(engine, rows, [alone(model, row, beams) for row in rows], beams)
        _report(bench, "engine equals generate: 3 beams", len(rows), *found)
        _seeds(bench, engine, mixed_rows(count, 4), tokens)


def _report(bench: Bench, what: str, count: int, wrong: int, ties: int) -> None:
    note = f"{ties} differ only after tied logits" if ties else ""
    bench.check(what, not wrong, f"{count - wrong} of {count} answers", note)


def _seeds(bench: Bench, engine: Engine, rows: Sequence[Row], tokens: int) -> None:
    """A sampled answer depends on its seed, not on the rest of the batch."""
    params = [SamplingParams(tokens, temperature=0.8, top_p=0.9, seed=seed) for seed in range(len(rows))]
    requests = [Request(ids, images, options) for (ids, images), options in zip(rows, params)]
    together = [done.token_ids for done in engine.generate(requests)]
    by_itself = [engine.generate([request])[0].token_ids for request in requests]
    same = sum(one == other for one, other in zip(together, by_itself))
    bench.check("seeded sampling, batched and alone", same == len(rows), f"{same} of {len(rows)}")
    others = [replace(request, params=replace(request.params, seed=99 + k)) for k, request in enumerate(requests)]
    changed = sum(a != b.token_ids for a, b in zip(together, engine.generate(others)))
    bench.check("different seeds return different answers", changed > 0, f"{changed} of {len(rows)}")
