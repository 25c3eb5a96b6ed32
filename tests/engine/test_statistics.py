"""The engine's statistics are exact on constructed loads: tokens, cache hits, evictions, occupancy, waiting, time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch

from llava.engine import Engine, Request, SamplingParams, Statistics
from llava.engine.statistics import Clock

MakeEngine = Callable[..., Engine]
IMAGES = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
TOKENS = 16  # of an image
SYSTEM = [1, *range(300, 339)]  # 40 tokens


def ask(ids: list[int], images: list[torch.Tensor] | None = None, new: int = 2, **more: object) -> Request:
    return Request(ids, images or [], SamplingParams(new), **more)  # type: ignore[arg-type]


def counted(stats: Statistics, *names: str) -> tuple[int, ...]:
    return tuple(getattr(stats, name) for name in names)


def test_a_new_engine_has_counted_nothing(engine: Engine) -> None:
    stats = engine.statistics()
    load = {"max_batch_size": 4, "seconds": stats.seconds}
    assert stats == Statistics(**load)  # type: ignore[arg-type]


def test_questions_about_one_image_compute_it_once(make_engine: MakeEngine) -> None:
    """Five prompts in one batch share 40 tokens and an image; later ones find both in the prefix cache."""
    engine = make_engine(max_batch_size=8)
    first = engine.generate([ask([*SYSTEM, -200, 350 + n], IMAGES[:1]) for n in range(5)])
    stats = engine.statistics()
    shared = 40 + TOKENS
    assert counted(stats, "requests", "prompt_tokens") == (5, 5 * (shared + 1))
    assert counted(stats, "computed_tokens", "cached_tokens") == (shared + 5, 4 * shared)
    assert counted(stats, "prefix_hits", "images", "encoded_images", "feature_hits") == (4, 5, 1, 4)
    assert stats.generated_tokens == sum(len(one.token_ids) for one in first)
    engine.generate([ask([*SYSTEM, -200, 360 + n], IMAGES[:1]) for n in range(2)])
    later = engine.statistics().since(stats)
    assert counted(later, "computed_tokens", "cached_tokens", "prefix_hits") == (2, 2 * shared, 2)
    assert counted(later, "images", "encoded_images", "feature_hits") == (2, 0, 0)  # in the cached prefix


def test_the_prompt_that_computes_a_prefix_for_waiting_ones_has_no_hit(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    engine.generate([ask([*SYSTEM, 350 + n, 3, 4, 5]) for n in range(3)])
    stats = engine.statistics()
    assert counted(stats, "prompt_tokens", "computed_tokens", "cached_tokens", "prefix_hits") == (132, 52, 80, 2)


def test_cached_features_are_hits_where_the_prefix_differs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for number in range(3):
        engine.generate([ask([1, 310 + number, -200, 320], IMAGES[:1], cache_prefix=False)])
    engine.generate([ask([1, 330, -200, 320, -200], IMAGES[:2], cache_prefix=False)])
    assert counted(engine.statistics(), "images", "encoded_images", "feature_hits") == (5, 2, 3)
    assert engine.statistics().cached_tokens == 0


def test_chunks_of_a_long_prompt_are_not_hits_of_its_own(make_engine: MakeEngine) -> None:
    engine = make_engine(max_prefill_tokens=32)
    engine.generate([ask([1, *(3 + n * 7 % 380 for n in range(150))])])
    stats = engine.statistics()
    assert counted(stats, "prompt_tokens", "computed_tokens", "cached_tokens", "prefix_hits") == (151, 151, 0, 0)


def test_evictions_are_counted(make_engine: MakeEngine, bytes_per_token: int) -> None:
    """Room for one sequence of prefixes, and for the features of one image."""
    probe = make_engine()
    probe.generate([ask([1, -200, 300], IMAGES[:1])])
    one = probe.statistics().feature_bytes
    engine = make_engine(prefix_cache_bytes=50 * bytes_per_token, feature_cache_bytes=one)
    for number in range(3):
        engine.generate([ask([310 + number, *range(340, 372)], new=4)])
        engine.generate([ask([1, -200, 300 + number], [IMAGES[number]], cache_prefix=False)])
    stats = engine.statistics()
    assert counted(stats, "prefix_evictions", "feature_evictions") == (2, 2)
    assert stats.feature_bytes == one and 0 < stats.prefix_bytes <= 50 * bytes_per_token


def test_occupancy_and_waiting(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three requests run for five tokens, of which the prefill gives the first; the third waits for them."""
    engine = make_engine(max_batch_size=2)
    handles = [engine.submit(ask([1, 300 + n], new=5)) for n in range(3)]
    assert counted(engine.statistics(), "requests", "running", "waiting") == (0, 0, 3)
    submitted = [sequence.submitted for sequence in engine._waiting]
    monkeypatch.setattr("llava.engine.waiting.time.perf_counter", lambda: submitted[2] + 100.0)
    engine.step()
    stats = engine.statistics()
    assert counted(stats, "requests", "running", "waiting") == (2, 2, 1)
    assert stats.waiting_seconds == pytest.approx(sum(submitted[2] + 100 - each for each in submitted[:2]))
    for handle in handles:
        handle.result()
    stats = engine.statistics()
    tokens = [len(handle.result().token_ids) for handle in handles]
    assert stats.decode_rows == sum(tokens) - 3 == stats.generated_tokens - 3
    assert stats.decode_steps == max(tokens[:2]) - 1 + tokens[2] - 1
    assert counted(stats, "requests", "running", "waiting") == (3, 0, 0)


def test_beam_search_counts_its_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    answer = engine.generate([Request([1, -200, 300], IMAGES[:1], SamplingParams(4, num_beams=2))])[0]
    stats = engine.statistics()
    assert counted(stats, "requests", "prompt_tokens", "computed_tokens") == (1, 2 + TOKENS, 2 + TOKENS)
    assert stats.generated_tokens == len(answer.token_ids) and stats.seconds["decode"] > 0


def test_the_parts_sum_to_the_age_of_the_engine(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by one second at every reading, each part gets its readings, and nothing is lost."""
    engine, now = make_engine(), [0.0]
    clock = Clock()
    engine.clock = engine.prefiller.clock = clock
    _, _, born = clock._state

    def tick() -> float:
        now[0] += 1.0
        return born + now[0]

    monkeypatch.setattr("llava.engine.statistics.time.perf_counter", tick)
    engine.generate([ask([1, -200, 300], IMAGES[:1], new=3)])
    seconds = engine.statistics().seconds
    assert sum(seconds.values()) == pytest.approx(now[0])
    assert set(seconds) == {"tower", "prefill", "decode", "sampling", "detokenize", "other", "idle"}
    assert all(value >= 1 for value in seconds.values())
    assert seconds["tower"] == 1 and seconds["decode"] == engine.decode_steps
    assert seconds["idle"] == engine.decode_steps + 1  # before each of the steps, and now


def test_a_failed_step_leaves_the_clock_idle(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine.model_runner, "prefill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([ask([1, 300])])
    _, current, _ = engine.clock._state
    assert current == "idle"


def test_a_reading_beside_a_step_loses_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape in another thread, during which the engine's thread starts a step, must not show an earlier time."""
    clock, now = Clock(), [0.0]
    _, _, born = clock._state

    def reading() -> float:
        if now[0] == 100.0:  # the scrape has begun
            now[0] = 101.0
            clock._switch("other")
        return born + now[0]

    monkeypatch.setattr("llava.engine.statistics.time.perf_counter", reading)
    now[0] = 99.0
    assert clock.seconds()["idle"] == pytest.approx(99.0)
    now[0] = 100.0
    assert clock.seconds()["idle"] >= 98.9


def test_the_summary_has_the_totals() -> None:
    seconds = {"tower": 1.0, "prefill": 2.0, "decode": 6.0, "idle": 1.0}
    stats = Statistics(
        prompt_tokens=12_345, cached_tokens=6_173, generated_tokens=50, images=8, encoded_images=2,
        decode_steps=4, decode_rows=10, max_batch_size=4, seconds=seconds,  # type: ignore[arg-type]
    )  # fmt: skip
    assert stats.summary() == (
        "12,345 prompt tokens (50% cached), 50 generated; 8 images (2 encoded); mean batch 2.5 of 4; "
        "time: tower 10%, prefill 20%, decode 60%, idle 10%"
    )
    assert Statistics().summary().startswith("0 prompt tokens (0% cached)")


def test_since_keeps_the_load_and_subtracts_everything_else() -> None:
    started = time.perf_counter()
    names = [item.name for item in dataclasses.fields(Statistics) if item.name != "seconds"]
    whole = Statistics(**{name: 10 + at for at, name in enumerate(names)})  # type: ignore[arg-type]
    earlier = Statistics(**dict.fromkeys(names, 4))  # type: ignore[arg-type]
    kept = {"running", "waiting", "max_batch_size", "kv_bytes", "prefix_bytes", "feature_bytes"}
    found = whole.since(earlier)
    assert all(getattr(found, name) == 10 + at - (0 if name in kept else 4) for at, name in enumerate(names))
    assert Clock().seconds()["idle"] >= 0 and time.perf_counter() >= started
