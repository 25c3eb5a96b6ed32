"""Synchronisations of a decode step: one upload and one download for any batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.engine import Engine, Request, SamplingParams
from llava.engine.sequence import GuidedDecodingParams
from llava.engine.token_budget import StepBudget
from tests import devices
from tests.cuda.conftest import Parts, load
from tests.cuda.events import Events

PIXELS = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
COMMON = [1, *range(300, 330)]  # long enough to be shared
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9}}
FIELDS = {
    "filters": {"temperature": 0.8, "top_k": 20, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {310: 2.0}},
    "logprobs": {"logprobs": 5},
    "all": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "frequency_penalty": 0.5, "logprobs": 2},
}


@pytest.fixture(scope="module")
def parts(checkpoints: dict[str, tuple[Path, Any]]) -> Parts:
    with devices.simulated_cuda():
        return load(checkpoints, "llama sdpa", "cuda")


def requests(count: int, prefix: str, sampling: str) -> list[Request]:
    """`count` prompts of different lengths: separate, after one shared prefix, or after one of two images."""
    made = []
    for number in range(count):
        params = SamplingParams(max_new_tokens=40, seed=number, **{**SAMPLING, **FIELDS}[sampling])
        own = [200 + number, *range(40, 40 + 3 * (number % 5)), 50 + number]
        if prefix == "own":
            made.append(Request([1, *own], (), params))
        elif prefix == "text":
            made.append(Request([*COMMON, *own], (), params))
        else:
            made.append(Request([*COMMON, -200, *own], [PIXELS[number % 2]], params))
    return made


def steady_steps(engine: Engine, given: Sequence[Request], card: devices.Card, count: int = 6) -> list[Events]:
    """The events of decode steps in which no request starts or ends."""
    engine.special.end = frozenset()  # a sampled end token would make the batch smaller
    handles = [engine.submit(request) for request in given]
    found: list[Events] = []
    for step in range(40):
        before = engine.running
        with card.record() as events:
            engine.step()
        if step >= 2 and before == engine.running == len(given):
            found.append(events)
        if len(found) == count:
            break
    for handle in handles:
        handle.cancel()
    engine.step()
    return found


@pytest.mark.parametrize("prefix", ["own", "text", "images"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("count", [1, 4, 16])
def test_one_upload_and_one_download(parts: Parts, card: devices.Card, count: int, sampling: str, prefix: str) -> None:
    engine = Engine(*parts, max_batch_size=16)
    steps = steady_steps(engine, requests(count, prefix, sampling), card)
    assert steps, "no step without a request that starts or ends"
    for events in steps:
        counts = (len(events.uploads), len(events.downloads), len(events.syncs))
        assert counts == (1, 1, 0) and len(events.waits) <= 1, f"\n{events.table()}"


@pytest.mark.parametrize("fields", FIELDS)
def test_sampling_fields_share_the_upload_and_the_download(parts: Parts, card: devices.Card, fields: str) -> None:
    """With a plain request in the batch, which has none of the fields."""
    engine = Engine(*parts, max_batch_size=16)
    steps = steady_steps(engine, [*requests(4, "text", fields), *requests(1, "own", "greedy")], card)
    assert steps
    for events in steps:
        assert (len(events.uploads), len(events.downloads), len(events.syncs)) == (1, 1, 0), f"\n{events.table()}"


def test_a_grammar_adds_one_upload_and_no_synchronisation(parts: Parts, card: devices.Card) -> None:
    """Its masks are computed while the forward pass runs, so they are sent after it, for all rows together."""
    engine = Engine(*parts, max_batch_size=16)
    guide = GuidedDecodingParams(regex="[a-z]{60}")
    engine.grammars.compile(guide)  # while the engine has end tokens
    guided = [Request([1, 300 + n], params=SamplingParams(50, guided_decoding=guide)) for n in range(3)]
    steps = steady_steps(engine, [*guided, *requests(2, "own", "sampled")], card)
    assert steps
    for events in steps:
        assert (len(events.uploads), len(events.downloads), len(events.syncs)) == (2, 1, 0), f"\n{events.table()}"


@pytest.mark.parametrize("kind", ["llama eager", "mpt"])
def test_the_librarys_forward_waits_no_more(
    checkpoints: dict[str, tuple[Path, Any]], card: devices.Card, kind: str
) -> None:
    engine = Engine(*load(checkpoints, kind, "cuda"))
    steps = steady_steps(engine, requests(4, "images", "sampled"), card)
    assert steps
    for events in steps:
        assert (len(events.uploads), len(events.downloads), len(events.syncs)) == (1, 1, 0), f"\n{events.table()}"


def test_a_steady_step_is_found(parts: Parts, card: devices.Card) -> None:
    """The assertion above covers steps that do work."""
    engine = Engine(*parts, max_batch_size=16)
    for prefix in ("own", "text", "images"):
        steps = steady_steps(engine, requests(4, prefix, "greedy"), card)
        assert len(steps) == 6 and all(events.downloads for events in steps)
        assert (engine.statistics().prefix_bytes > 0) is (prefix != "own")


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_prefill_with_images_waits_for_nothing_but_its_tokens(
    parts: Parts, card: devices.Card, sampling: str, count: int
) -> None:
    """Rows of different lengths after two images: pixels, ids and indices are sent asynchronously."""
    engine = Engine(*parts, max_batch_size=16)
    handles = [engine.submit(request) for request in requests(count, "images", sampling)]
    with torch.no_grad(), card.record() as events:
        engine._prefill(StepBudget())
    assert engine.running + sum(handle.done for handle in handles) == count
    assert not events.syncs and len(events.downloads) == 1, f"\n{events.table()}"
