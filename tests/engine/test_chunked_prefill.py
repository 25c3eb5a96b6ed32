"""Chunked prefill: prompts that join running requests in parts give the same tokens, and hold nobody up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.engine import Engine, Request, RequestHandle, SamplingParams
from llava.engine.arguments import token_limit
from llava.engine.cache import CacheSpec, KVCache
from llava.engine.sequence import GuidedDecodingParams
from llava.engine.token_budget import StepBudget, TokenBudget, TokenLimit
from llava.errors import ConfigError
from llava.model.builder import load_pretrained_model
from tests import tiny
from tests.engine.conftest import Solo

MakeEngine = Callable[..., Engine]
IMAGES = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
LONG = [1, *(3 + n * 7 % 380 for n in range(150))]
MIXED = [*LONG[:20], -200, 310, 311, -200, *range(320, 340), -200]  # ends with an image


def ask(ids: list[int], new: int = 6, images: tuple[int, ...] = (), **options: Any) -> Request:
    return Request(ids, [IMAGES[index] for index in images], SamplingParams(new, **options))


def busy(engine: Engine, rows: int = 3) -> list[RequestHandle]:
    """An engine that decodes `rows` requests, which are past their beginning."""
    handles = [engine.submit(ask([1, 300 + n], 200)) for n in range(rows)]
    for _ in range(12):
        engine.step()
    return [handle for handle in handles if not handle.done]


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward pass of a prompt."""
    sizes: list[int] = []
    run = engine.model_runner._run  # type: ignore[attr-defined]

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(x))
        return run(x, *rest)

    monkeypatch.setattr(engine.model_runner, "_run", counted)
    return sizes


@pytest.fixture(params=["shared prefixes", "transformers"])
def any_engine(request: Any, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """Engines that read prefixes in place, and engines over transformers' forward, whose rows contain them."""
    if request.param == "transformers":
        monkeypatch.setattr("llava.engine.llama.LlamaRunner.supports", staticmethod(lambda model: False))
    return make_engine


@pytest.mark.parametrize("limit", [1, 5, 40, "auto"])
def test_a_prompt_in_chunks_has_the_tokens_and_logits_of_one_pass(
    any_engine: MakeEngine, solo: Solo, limit: TokenLimit
) -> None:
    """Also where a chunk ends within an image, and the prompt with one."""
    whole, engine = any_engine(), any_engine(max_num_batched_tokens=limit)
    running = busy(engine)
    asks = [ask(LONG, logprobs=3), ask(MIXED, 6, (0, 1, 0), logprobs=3)]
    handles = [engine.submit(one) for one in asks]
    for expected, handle in zip(whole.generate(asks), handles, strict=True):
        answer = handle.result()
        assert answer.token_ids == expected.token_ids and answer.logprobs and expected.logprobs
        for mine, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
    assert handles[0].result().token_ids == solo(LONG, [], 6)
    stats = engine.statistics()
    assert stats.prefill_chunks > 4 and stats.encoded_images == 2
    assert stats.prompt_tokens == stats.computed_tokens + stats.cached_tokens
    assert [one.result().token_ids for one in running] == [solo([1, 300 + n], [], 200) for n in range(len(running))]


def test_every_step_gives_each_stream_a_token_and_stays_within_the_limit(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_batched_tokens=23)
    layers: list[int] = []
    for layer in engine.model.get_vision_tower().layers:
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda x, forward=forward: (layers.append(1), forward(x))[1])
    assert len(busy(engine)) == 3
    sizes, prompt = watch(engine, monkeypatch), engine.submit(ask(MIXED, 3, (0, 1, 2)))
    steps = 0
    while not prompt.done and engine.running == 3:
        before = engine.generated_tokens, sum(sizes), len(layers)
        engine.step()
        steps += 1
        assert engine.generated_tokens - before[0] >= 3
        tokens, tower = sum(sizes) - before[1], len(layers) - before[2]
        assert tokens <= 20 and tower <= 20 * engine.features.layers / 16 and tokens + tower
    assert steps >= len(MIXED) // 20 + 3


def test_chunks_of_an_idle_engine_are_as_large_as_without_a_limit(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_batched_tokens=4)
    sizes = watch(engine, monkeypatch)
    engine.generate([ask(LONG, 1), ask([1, *LONG[40:90]], 1)])
    assert sorted(sizes) == [51, 151] and engine.statistics().prefill_chunks == 0


def test_short_prompts_that_miss_one_step_take_the_next(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=11, max_batch_size=16)
    busy(engine, 3)
    long = engine.submit(ask(LONG, 1))
    engine.step()
    short = [engine.submit(ask([1, 340 + number], 1)) for number in range(6)]  # half a step has room for two
    while not all(handle.done for handle in short):
        engine.step()
    assert not long.done


def test_a_long_prompt_finishes_although_short_ones_overtake_it(make_engine: MakeEngine, solo: Solo) -> None:
    """Three short ones arrive at every step, and would fill it."""
    engine = make_engine(max_num_batched_tokens=15, max_batch_size=8)
    busy(engine, 3)
    long, later, steps = engine.submit(ask(LONG, 4)), list[RequestHandle](), 0
    while not long.done and steps < 60:
        later += [engine.submit(ask([1, 340 + (steps + n) % 40, 303], 1)) for n in range(3)]
        engine.step()
        steps += 1
        assert steps == 1 or later[0].done  # in the first step, the long one takes all
    assert steps < 30  # it has at least half of each step
    assert long.result().token_ids == solo(LONG, [], 4)
    assert later[0].result().token_ids == solo([1, 340, 303], [], 1)
    assert all(one.result().finish_reason in ("stop", "length") for one in later)


def test_several_long_prompts_run_one_after_the_other(make_engine: MakeEngine, solo: Solo) -> None:
    engine = make_engine(max_num_batched_tokens=33, max_batch_size=8)
    busy(engine, 3)
    prompts = [LONG[n:] for n in range(4)]
    handles = [engine.submit(ask(ids, 4)) for ids in prompts]
    assert [one.result().token_ids for one in handles] == [solo(ids, [], 4) for ids in prompts]


def test_a_prompt_can_be_cancelled_or_fail_between_two_chunks(
    make_engine: MakeEngine, solo: Solo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_batched_tokens=10)
    running = busy(engine)
    cancelled, other = engine.submit(ask(LONG)), engine.submit(ask(LONG[::-1]))
    for _ in range(3):
        engine.step()
    assert engine.statistics().waiting == 2 and engine.statistics().prefill_chunks == 3
    cancelled.cancel()
    engine.step()
    assert cancelled.result().finish_reason == "cancelled" and cancelled.result().token_ids == ()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_runner, "prefill_kv", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert "ZeroDivisionError" in str(other.result().error)
    healthy = engine.submit(ask(LONG))
    engine.step()
    with monkeypatch.context() as patch:  # a failure of another prompt leaves the chunks alone
        patch.setattr(engine.prefiller, "run", lambda *_: 1 / 0)
        engine.submit(ask([1, 7], 2))
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert healthy.result().token_ids == solo(LONG, [], 6)
    aborted = engine.submit(ask(LONG[5:]))
    engine.step()
    engine.abort("stopped")
    assert aborted.result().error == "stopped" and not engine.step()
    assert all(handle.done for handle in running)


def test_equal_prompts_and_the_next_turn_use_the_computed_prefix(make_engine: MakeEngine, solo: Solo) -> None:
    engine = make_engine(max_num_batched_tokens=20, max_batch_size=8)
    busy(engine)
    computed = engine.statistics().computed_tokens
    choices = [engine.submit(ask(LONG, 5, seed=n)) for n in range(3)]
    assert {one.result().token_ids for one in choices} == {solo(LONG, [], 5)}
    assert engine.statistics().computed_tokens - computed == len(LONG) + 2
    turn = [*LONG, *choices[0].result().token_ids, 320]
    hits = engine.statistics().cached_tokens
    assert engine.submit(ask(turn, 4)).result().token_ids == solo(turn, [], 4)
    assert engine.statistics().cached_tokens - hits >= len(LONG) - 1


def test_guided_and_sampled_answers_do_not_change(make_engine: MakeEngine) -> None:
    pytest.importorskip("llguidance")
    guide = GuidedDecodingParams(choice=["red circle", "blue triangle"])
    asks = [
        ask(LONG, 20, guided_decoding=guide),
        ask(LONG[::-1], 8, temperature=1.0, top_p=0.9, seed=3),
        ask(MIXED, 8, (0, 1, 2), repetition_penalty=1.3, logit_bias={300: 4.0}),
    ]
    engine = make_engine(max_num_batched_tokens=9, max_batch_size=8)
    busy(engine)
    handles = [engine.submit(one) for one in asks]
    assert [one.result() for one in handles] == make_engine().generate(asks)


def test_mpt(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Attention with linear biases, over transformers' forward."""
    chat = tiny.make_mpt_chat(tmp_path / "mpt", tiny_dirs["tower"])
    tokenizer, model, processor, _ = load_pretrained_model(chat, device="cpu")
    expected = Engine(model, tokenizer, processor).generate([ask(LONG)])[0]
    engine = Engine(model, tokenizer, processor, max_num_batched_tokens=16)
    engine.special.end = frozenset()
    busy(engine)
    assert engine.submit(ask(LONG)).result().token_ids[: len(expected.token_ids)] == expected.token_ids


class Ticks:
    """A clock for `TokenBudget`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("llava.engine.token_budget.time.perf_counter", lambda: self.now)


def rows(count: int, tokens: int = 20) -> list[Any]:
    return [SimpleNamespace(tokens=[0] * tokens)] * count


def simulate(budget: TokenBudget, clock: Ticks, running: int, waiting: int) -> Iterator[StepBudget]:
    """Steps in which decoding takes 40 ms, a chunk 4 ms and 0.5 ms per token, and a layer 10 ms."""
    while True:
        step = budget.begin(rows(running), waiting)
        if waiting and step.is_limited:
            if step.chunk(10**6):
                step.spend(tokens=step.chunk(10**6))
                clock.now += 0.004 + 0.0005 * step.tokens
        elif waiting:
            step.spend(tokens=600)
            clock.now += 0.3
        budget.prefilled()
        clock.now += 0.04
        budget.end(step, running)
        yield step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_automatic_limit_gives_prompts_a_share_of_the_decode_time(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, features = Ticks(monkeypatch), SimpleNamespace(layer_tokens=60.0)
    budget = TokenBudget("auto", device, features)  # type: ignore[arg-type]
    assert not next(simulate(budget, clock, 0, 1)).is_limited  # nobody waits for it
    for _, _ in zip(range(5), simulate(budget, clock, 16, 0)):
        pass
    steps = [step for step, _ in zip(simulate(budget, clock, 16, 1), range(40))]
    assert all(step.is_limited for step in steps)
    assert max(step.tokens for step in steps) <= 0.024 / 0.0005 * 1.2 or device == "cuda"  # at least 128 there
    late = [step.tokens for step in steps[-8:] if step.tokens]
    assert all((0.004 + 0.0005 * tokens) == pytest.approx(0.024, rel=0.15) or device == "cuda" for tokens in late)
    assert sum(step.tokens == 0 for step in steps) == (1 if device == "cuda" else 0)  # one step is timed alone
    few = [step.tokens for step, _ in zip(simulate(budget, clock, 4, 1), range(40))][-1]
    assert few > 1.5 * late[-1] or device == "cuda"  # 4 running requests per waiting one


def test_bursts_and_backlogs_are_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = TokenBudget("auto", "cpu", SimpleNamespace(layer_tokens=60.0))  # type: ignore[arg-type]
    Ticks(monkeypatch)
    assert budget.begin(rows(16), 1).is_limited
    assert not budget.begin(rows(16), 16).is_limited  # a backlog
    assert not budget.begin(rows(16, tokens=2), 1).is_limited  # the last of a burst of arrivals
    assert not budget.begin([], 5).is_limited
    assert not TokenBudget(None, "cpu", SimpleNamespace()).begin(rows(3), 1).is_limited  # type: ignore[arg-type]
    fixed = TokenBudget(100, "cpu", SimpleNamespace(layer_tokens=60.0))  # type: ignore[arg-type]
    assert fixed.begin(rows(16), 9).chunk(1000) == 84 and fixed.begin(rows(200), 1).chunk(1000) == 1


@pytest.mark.parametrize("limit", [0, -3, "much", 2.5])
def test_an_invalid_limit_is_refused(make_engine: MakeEngine, limit: Any) -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens"):
        make_engine(max_num_batched_tokens=limit)
    with pytest.raises(Exception, match="at least 1"):
        token_limit(str(limit))
    assert (token_limit("auto"), token_limit("512")) == ("auto", 512)


def test_a_row_that_joins_does_not_copy_the_others() -> None:
    spec = CacheSpec(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))
    cache = KVCache(spec, max_rows=8)
    cache.join(torch.randn(2, 2, 1, 1, 10, 2), [10])
    buffer, one = cache.data.data_ptr(), cache.nbytes
    for _ in range(7):
        cache.join(torch.randn(2, 2, 1, 1, 3, 2), [3])
    assert cache.data.data_ptr() == buffer and cache.nbytes == 8 * one
    assert KVCache(spec, max_rows=8, budget=1).nbytes == 0
