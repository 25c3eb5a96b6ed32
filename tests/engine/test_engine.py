"""The engine returns the tokens of one-at-a-time `generate` for any batch, and refuses invalid requests."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.engine import Engine, Request, RequestHandle, SamplingParams, cache, load_engine, prefix_cache
from llava.errors import ConfigError, RequestError
from llava.model.builder import load_pretrained_model
from tests.engine.conftest import Solo

IMAGES = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
TOKENS = st.integers(3, 383)
MakeEngine = Callable[..., Engine]
NODE = prefix_cache.Node


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A prompt of 0 to 3 images; half of them share a prefix."""
    count = draw(st.integers(0, 3))
    begin = [1, 300, 301, 302] if draw(st.booleans()) else [1, *draw(st.lists(TOKENS, max_size=6))]
    ids = list(begin)
    for _ in range(count):
        ids += [-200, *draw(st.lists(TOKENS, max_size=5))]
    ids += draw(st.lists(TOKENS, min_size=1, max_size=30))
    images = [IMAGES[draw(st.integers(0, 3))] for _ in range(count)]
    return Request(ids, images, SamplingParams(max_new_tokens=draw(st.integers(1, 20))))


def max_tokens(request: Request, engine: Engine) -> int:
    """Largest number of cached tokens of a request."""
    length = len(request.prompt) + 15 * len(request.images)
    return length + min(request.params.max_new_tokens, engine.model_runner.context_length - length)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule_equals_one_at_a_time(
    make_engine: MakeEngine, solo: Solo, bytes_per_token: int, data: st.DataObject
) -> None:
    """Any order of arrival, cancellation and refusal yields the same tokens, within all budgets, and leaks nothing."""
    room = data.draw(st.sampled_from([None, 50, 110, 160, 300]))  # tokens; a request needs up to 118
    budget = None if room is None else room * bytes_per_token
    engine = make_engine(
        max_batch_size=data.draw(st.integers(1, 6)),
        max_prefill_tokens=data.draw(st.sampled_from([1, 100, 8192])),
        max_num_batched_tokens=data.draw(st.sampled_from([None, "auto", 1, 9, 60])),
        **dict.fromkeys(("prefix_cache_bytes", "feature_cache_bytes"), data.draw(st.sampled_from([0, 20_000, 2**29]))),
        kv_cache_bytes=budget,
    )
    engine._on_cuda = data.draw(st.booleans())  # as on CUDA, where detokenization runs one step later
    stores = (engine.features.store, engine.prefiller.prefix_cache)
    nodes: WeakSet[prefix_cache.Node] = WeakSet()

    def remember(*parts: Any) -> prefix_cache.Node:
        node = NODE(*parts)
        nodes.add(node)
        return node

    waiting = data.draw(st.lists(requests(), min_size=3, max_size=8))
    submitted = []
    with mock.patch.object(prefix_cache, "Node", remember):
        while waiting or any(not handle.done for _, handle in submitted):
            least = int(all(handle.done for _, handle in submitted))  # every step has work
            for _ in range(data.draw(st.integers(least, 3)) if waiting else 0):
                request = waiting.pop() if waiting else None
                if request is not None and room is not None and max_tokens(request, engine) > room:
                    with pytest.raises(RequestError, match="kv_cache_bytes"):
                        engine.submit(request)
                elif request is not None:
                    submitted.append((request, engine.submit(request)))
            if submitted and data.draw(st.integers(0, 9)) == 0:
                submitted[data.draw(st.integers(0, len(submitted) - 1))][1].cancel()
            engine.step()
            assert budget is None or engine.statistics().kv_bytes <= budget
            assert all(store.bytes <= store.budget for store in stores)
    for request, handle in submitted:
        expected = solo(request.prompt, request.images, request.params.max_new_tokens)
        answer = handle.result()
        if answer.finish_reason == "cancelled":
            assert answer.token_ids == expected[: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected
            assert answer.finish_reason == ("stop" if expected[-1] == 2 else "length")
    assert not engine.step() and engine._cache.lengths == [] and engine._cache.prefixes == []
    assert set(nodes) == set(engine.prefiller.prefix_cache._nodes)  # evicted nodes are freed with their last row
    assert sum(node.data.nbytes for node in nodes) == engine.statistics().prefix_bytes


@pytest.mark.golden
@pytest.mark.parametrize("folder", ["internvl-chat-tiny-224to336", "internvl-chat-tiny-448"])
def test_golden_generations(golden_dir: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden_dir / "models")  # the checkpoints name their towers relative to it
    engine = load_engine(folder, device="cpu")
    stored = json.loads((golden_dir / "models" / "cases.json").read_text())["cases"]
    cases = [case for case in stored if case["kind"] == "generate" and case["checkpoint"] == folder]
    assert cases
    answers = engine.generate(
        [
            Request(
                case["input_ids"][0],
                [golden_pixels(*image) for image in case["images"] or ()],
                SamplingParams(max_new_tokens=case["max_new_tokens"]),
            )
            for case in cases
        ]
    )
    for case, answer in zip(cases, answers):
        assert list(answer.token_ids) == case["new_ids"], case["id"]


def golden_pixels(height: int, width: int, seed: int) -> torch.Tensor:
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    channels = [
        (((7 + seed) * y + (3 + 2 * seed) * x + 11 * c * (seed + 1) + (x * y) // (5 + seed)) % 256) / 127.5 - 1
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels).astype(np.float32))


def test_images_are_encoded_once_and_together(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_batch_size=8)
    sizes: list[int] = []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda images: (sizes.append(len(images)), encode(images))[1])
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    ask = [Request(f"<image>\nquestion {n}", [(red, blue)[n % 2].copy()], SamplingParams(4)) for n in range(8)]
    first = engine.generate(ask)
    assert sizes == [2]
    assert engine.generate(ask) == first and sizes == [2]
    assert first[0].text != first[1].text or first[0].token_ids != first[1].token_ids


def test_shared_prefixes_are_computed_once(make_engine: MakeEngine, solo: Solo) -> None:
    engine = make_engine(max_batch_size=8)
    prompts = [[1, 300, 310, -200, 320, 330 + n] for n in range(6)]
    answers = engine.generate([Request(ids, [IMAGES[0]], SamplingParams(5)) for ids in prompts])
    assert [answer.token_ids for answer in answers] == [solo(ids, [IMAGES[0]], 5) for ids in prompts]
    assert engine.prefiller.computed_tokens == (4 + 16) + 6 * 1  # 320 belongs to all of them, too
    assert engine.prefiller.cached_tokens == 5 * (4 + 16)


def test_streamed_pieces_join_to_the_text(make_engine: MakeEngine) -> None:
    engine, request = make_engine(), Request("What color is the shape?", params=SamplingParams(40))
    text = engine.generate([request])[0].text
    pieces = list(engine.stream(request))
    assert len(pieces) > 3 and "".join(pieces) == text == text.strip()


def test_stop_strings_cut_the_text_and_free_the_row(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = engine.generate([Request("What color?", params=SamplingParams(40))])[0]
    stop = whole.text[5:8]
    answer = engine.generate([Request("What color?", params=SamplingParams(40, stop=("never", stop)))])[0]
    assert answer.finish_reason == "stop" and answer.text == whole.text[: whole.text.find(stop)].strip()
    assert len(answer.token_ids) < len(whole.token_ids)


def test_a_special_token_named_as_stop_ends_the_answer(make_engine: MakeEngine, solo: Solo) -> None:
    engine = make_engine()
    tokens = solo([1, 300], [], 30)
    engine.special._by_text["<|end|>"] = tokens[4]
    answer = engine.generate([Request([1, 300], params=SamplingParams(30, stop=("<|end|>",)))])[0]
    assert answer.token_ids == tokens[: tokens.index(tokens[4]) + 1] and answer.finish_reason == "stop"


def test_a_seed_fixes_the_answer_for_any_batch(make_engine: MakeEngine) -> None:
    params = SamplingParams(20, temperature=1.5, top_p=0.9, seed=11)
    alone = make_engine().generate([Request("Describe", params=params)])[0]
    others = [Request(f"Why {n}?", params=SamplingParams(3 + n, temperature=1.0, seed=n)) for n in range(5)]
    crowd = make_engine().generate([*others, Request("Describe", params=params)])[-1]
    assert crowd.token_ids == alone.token_ids
    other_seed = make_engine().generate([Request("Describe", params=SamplingParams(20, 1.5, 0.9, 12))])[0]
    assert other_seed.token_ids != alone.token_ids


def test_cancelling_takes_effect_at_the_next_step(engine: Engine) -> None:
    running, other = (engine.submit(Request([1, 300 + n], params=SamplingParams(1000))) for n in range(2))
    waiting = [engine.submit(Request([1, 310], params=SamplingParams(1000))) for _ in range(4)]
    for _ in range(3):
        engine.step()
    running.cancel(), waiting[-1].cancel()
    engine.step()
    assert running.result().finish_reason == waiting[-1].result().finish_reason == "cancelled"
    assert len(running.result().token_ids) == 4 and waiting[-1].result().token_ids == ()
    assert not other.done
    for handle in (other, *waiting):
        handle.cancel()
    assert not engine.step() and engine._cache.lengths == []


def test_beam_search_equals_the_library(make_engine: MakeEngine, parts: tuple[Any, Any, Any]) -> None:
    model, ids = parts[0], [1, 300, -200, 310, 320]
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([ids]),
            images=IMAGES[0][None],
            num_beams=3,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=2,
        )[0, len(ids) :].tolist()
    answer = make_engine().generate([Request(ids, [IMAGES[0]], SamplingParams(8, num_beams=3))])[0]
    assert list(answer.token_ids) == expected[: expected.index(2) + 1 if 2 in expected else None]
    two = make_engine().generate([Request([1, -200, -200, 5], IMAGES[:2], SamplingParams(3, num_beams=2))])[0]
    assert len(two.token_ids) <= 3 and two.finish_reason in ("stop", "length")


@pytest.mark.parametrize(("tags", "images"), [(2, 1), (0, 1), (1, 0), (1, 3)])
def test_image_counts_must_agree(engine: Engine, tags: int, images: int) -> None:
    with pytest.raises(RequestError, match=rf"{tags} <image> placeholder.*{images} image"):
        engine.submit(Request("<image>" * tags + " what?", IMAGES[:images]))


def test_length_limits_count_image_tokens(engine: Engine) -> None:
    context = engine.model_runner.context_length
    fits = [1] * (context - 16 - 1) + [-200]
    handle = engine.submit(Request(fits, IMAGES[:1], SamplingParams(100)))
    assert handle.result().finish_reason == "length" and len(handle.result().token_ids) == 1
    assert handle.result().prompt_tokens == context - 1
    with pytest.raises(
        RequestError, match=rf"{context} tokens long \({context - 16} of text, 16 of 1 image.*{context}"
    ):
        engine.submit(Request([1, *fits], IMAGES[:1]))


def test_empty_prompts_and_missing_towers_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="empty"):
        engine.submit(Request([]))
    monkeypatch.setattr(engine.model.get_model(), "get_vision_tower", lambda: None)
    with pytest.raises(RequestError, match="no vision tower"):
        engine.submit(Request("<image>", IMAGES[:1]))


@pytest.mark.parametrize("prompt", [None, 5, [1.5], ["a"], [1, 384], [1, -5], torch.ones(1, 3), "a\ud83d"])
def test_invalid_prompts_are_refused(engine: Engine, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"must be text or token ids|must be in \[0, 383\]"):
        engine.submit(Request(prompt))


@pytest.mark.parametrize("image", ["photo.jpg", b"...", None, np.zeros((4, 4, 3)), torch.zeros(1, 3, 56, 56)])
def test_invalid_images_are_refused(engine: Engine, image: Any) -> None:
    with pytest.raises(RequestError, match="give a PIL image"):
        engine.submit(Request("<image>", [image]))


def test_an_empty_batch_size_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        make_engine(max_batch_size=0)


def test_a_request_without_finite_logits_fails_alone(engine: Engine, solo: Solo) -> None:
    broken = Request([1, -200, 3], [torch.full((3, 56, 56), float("nan"))], SamplingParams(4, logprobs=2))
    done = engine.generate([broken, Request([1, 300], params=SamplingParams(6))])
    assert done[0].finish_reason == "error" and "NaN" in str(done[0].error)
    assert done[0].logprobs == () and done[0].token_ids == ()
    assert done[1].token_ids == solo([1, 300], [], 6)
    assert engine.generate([Request([1, -200, 3], IMAGES[:1], SamplingParams(2))])[0].error is None


def test_a_closed_stream_is_cancelled(engine: Engine) -> None:
    stream = engine.stream(Request([1, 300], params=SamplingParams(1000)))
    next(stream)
    stream.close()
    engine.step()
    assert engine.running == 0


def test_a_failing_prefill_fails_its_requests_only(engine: Engine, solo: Solo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    healthy = engine.submit(Request([1, 300], params=SamplingParams(6)))
    engine.step()
    broken = engine.submit(Request([1, -200, 3], IMAGES[:1]))
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "encode_images", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert broken.result().finish_reason == "error" and "out of memory" in str(broken.result().error)
    assert healthy.result().token_ids == solo([1, 300], [], 6)


def test_a_wrong_number_of_embeddings_is_an_error_that_names_both(
    engine: Engine, solo: Solo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV slots that were planned but never written must not be read."""
    encode = engine.model.encode_images
    request = Request([1, 300, -200, 3], IMAGES[:1], SamplingParams(2))
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "encode_images", lambda images: encode(images)[:, :9])
        handle = engine.submit(request)
        with pytest.raises(RequestError, match="returned 12 embeddings for 19 token slots"):
            engine.step()
    assert handle.result().finish_reason == "error" and "16 tokens each" in str(handle.result().error)
    assert engine.statistics().prefix_bytes == 0
    data = torch.zeros(1, 2, 1, 9, 4)
    with pytest.raises(ValueError, match="9 tokens of keys and values for 10 tokens"):
        prefix_cache.PrefixCache(10**6).insert((), tuple(range(10)), [1] * 10, data)


def test_aspect_ratio_is_the_checkpoints_unless_given(make_engine: MakeEngine) -> None:
    wide = Image.new("RGB", (60, 20), "red")
    pad, crop = make_engine(), make_engine(image_aspect_ratio="crop")
    assert (pad.image_aspect_ratio, crop.image_aspect_ratio) == ("pad", "crop")
    assert not torch.equal(pad.features._pixels(wide), crop.features._pixels(wide))  # bars above and below


def test_requests_may_come_from_other_threads(engine: Engine, solo: Solo) -> None:
    def submit(first: int) -> list[RequestHandle]:
        return [engine.submit(Request([1, first + n], params=SamplingParams(4))) for n in range(20)]

    with ThreadPoolExecutor(3) as pool:
        batches = [pool.submit(submit, first) for first in (300, 320, 340)]
        while not all(batch.done() for batch in batches):
            engine.step()
    while engine.step():
        pass
    for first, batch in zip((300, 320, 340), batches):
        for n, handle in enumerate(batch.result()):
            assert handle.result().token_ids == solo([1, first + n], [], 4)


def test_threads_take_turns(engine: Engine, solo: Solo) -> None:
    def answers(first: int) -> list[tuple[int, ...]]:
        return [engine.generate([Request([1, first + n], params=SamplingParams(9))])[0].token_ids for n in range(6)]

    with ThreadPoolExecutor(3) as pool:
        for first, found in zip((300, 320, 340), pool.map(answers, (300, 320, 340)), strict=True):
            assert found == [solo([1, first + n], [], 9) for n in range(6)]


def test_an_interrupted_call_cancels_its_requests(engine: Engine) -> None:
    def interrupt(finished: int) -> None:
        raise KeyboardInterrupt

    long = Request([1, 300], params=SamplingParams(1000))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([long, Request([1, 301], params=SamplingParams(1))], interrupt)
    with pytest.raises(RequestError, match="placeholder"):
        engine.generate([long, Request("<image>")])
    assert not engine.step()


def test_progress_counts_every_request(engine: Engine) -> None:
    seen: list[int] = []
    engine.generate([Request([1, 300 + n], params=SamplingParams(1 + n)) for n in range(9)], seen.append)
    assert sum(seen) == 9 and len(seen) > 1


def test_finished_requests_are_freed(engine: Engine) -> None:
    handle = engine.submit(Request([1, 300], params=SamplingParams(3)))
    handle.result()
    reference = weakref.ref(handle)
    del handle
    gc.collect()
    assert reference() is None


def test_bfloat16_runs(tiny_dirs: dict[str, Path]) -> None:
    engine = load_engine(tiny_dirs["chat"], device="cpu", dtype="bfloat16")
    answers = engine.generate([Request([1, -200, 300 + n], IMAGES[n : n + 1], SamplingParams(4)) for n in range(3)])
    assert engine.model_runner.spec.dtype is torch.bfloat16 and all(len(answer.token_ids) >= 1 for answer in answers)


def test_eager_attention_agrees(tiny_dirs: dict[str, Path]) -> None:
    """Transformers' forward ("eager") and the engine's own ("sdpa") agree, also after the KV cache has grown."""
    ask = [Request([1, -200, *range(300, 301 + n)], IMAGES[:1], SamplingParams(90)) for n in range(5)]
    answers = []
    for kernel in ("eager", "sdpa"):
        tokenizer, model, processor, _ = load_pretrained_model(
            tiny_dirs["chat"], device="cpu", attn_implementation=kernel
        )
        answers.append(Engine(model, tokenizer, processor).generate(ask))
    assert answers[0] == answers[1]


def test_the_next_turn_reuses_the_last(make_engine: MakeEngine, solo: Solo) -> None:
    engine = make_engine()
    first = [1, *range(300, 330), -200, 310]
    answer = engine.generate([Request(first, IMAGES[:1], SamplingParams(12))])[0].token_ids
    second = [*first, *answer, 320, 321]
    before = engine.statistics()
    assert engine.generate([Request(second, IMAGES[:1], SamplingParams(8))])[0].token_ids == solo(second, IMAGES[:1], 8)
    after = engine.statistics()
    assert after.computed_tokens - before.computed_tokens == 3  # the last token of the answer, and the new ones
    assert after.cached_tokens - before.cached_tokens == len(second) - 1 + 16 - 3 and after.encoded_images == 1
    other = make_engine()
    other.generate([Request(first, IMAGES[:1], SamplingParams(12), cache_prefix=False)])
    assert other.statistics().prefix_bytes == 0


def test_the_kv_cache_stays_within_its_budget_and_larger_requests_are_refused(
    make_engine: MakeEngine, solo: Solo, bytes_per_token: int
) -> None:
    engine = make_engine(
        max_batch_size=8, kv_cache_bytes=100 * bytes_per_token, prefix_cache_bytes=0, feature_cache_bytes=0
    )
    prompts = [[1, *range(300, 310 + n)] for n in range(6)]
    handles = [engine.submit(Request(ids, params=SamplingParams(20))) for ids in prompts]
    most = 0
    while engine.step():
        most = max(most, engine.running)
        assert engine.statistics().kv_bytes <= 100 * bytes_per_token
    assert most == 3  # the shortest three need at most 33 token slots each
    assert [handle.result().token_ids for handle in handles] == [solo(ids, [], 20) for ids in prompts]
    with pytest.raises(RequestError, match="kv_cache_bytes"):
        engine.submit(Request([1, *range(300, 380)], params=SamplingParams(30)))


def test_chunked_prefill_of_a_long_prompt_does_not_delay_the_others(
    make_engine: MakeEngine, solo: Solo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_prefill_tokens=32)
    sizes: list[int] = []
    run = engine.model_runner._run  # type: ignore[attr-defined]
    monkeypatch.setattr(engine.model_runner, "_run", lambda x, *rest: (sizes.append(len(x)), run(x, *rest))[1])
    long = [1, *(3 + n * 7 % 380 for n in range(150))]
    assert engine.generate([Request(long, params=SamplingParams(5))])[0].token_ids == solo(long, [], 5)
    assert max(sizes) <= 32
    running = engine.submit(Request([1, 300], params=SamplingParams(30)))
    engine.step()
    later = [engine.submit(Request([1, n, *range(200, 220)], params=SamplingParams(2))) for n in (40, 41, 42)]
    tokens = engine.generated_tokens
    engine.step()
    assert engine.generated_tokens - tokens == 3  # one of the three was admitted: its first token, and one for each row
    assert running.result().token_ids == solo([1, 300], [], 30)
    assert [one.result().token_ids for one in later] == [solo([1, n, *range(200, 220)], [], 2) for n in (40, 41, 42)]


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_stop_string_ends_the_answer_and_the_cached_prefix_is_correct(
    make_engine: MakeEngine, overlaps: bool
) -> None:
    """With `_on_cuda` the text is decoded while the next token is computed; the results are the same."""
    prompt = [1, 300, *range(310, 330)]
    whole = make_engine().generate([Request(prompt, params=SamplingParams(40))])[0]
    stop = whole.text[8:11]
    engine = make_engine()
    engine._on_cuda = overlaps
    params = SamplingParams(40, stop=(stop,))
    answer, other = engine.generate([Request(prompt, params=params), Request([1, 301, 302], params=SamplingParams(40))])
    alone = make_engine().generate([Request(prompt, params=params)])[0]
    assert answer == alone and answer.finish_reason == "stop" and stop not in answer.text
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)] and len(answer.token_ids) < 40
    assert other == make_engine().generate([Request([1, 301, 302], params=SamplingParams(40))])[0]
    again = [*prompt, *whole.token_ids[:30]]
    turn = engine.generate([Request(again, params=SamplingParams(5))])[0]
    assert turn.token_ids == make_engine().generate([Request(again, params=SamplingParams(5))])[0].token_ids
    assert engine.statistics().cached_tokens > len(prompt)  # the tokens of the answer are cached, too


def test_an_overlapped_stream_is_at_most_one_step_late(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine._on_cuda = True
    handle = engine.submit(Request([1, 300, 301], params=SamplingParams(30)))
    pieces, lengths = "", []
    while engine.step():
        pieces += handle.take()
        lengths.append(len(pieces))
    assert len(set(lengths)) > 5  # it streams
    assert (pieces + handle.take()) == handle.result().text


def test_an_idle_engine_frees_its_kv_cache(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.generate([Request([1, 300, 301], params=SamplingParams(3))])
    assert engine.statistics().kv_bytes > 0  # a small buffer stays allocated
    monkeypatch.setattr(cache, "_IDLE_BYTES", 0)
    engine._on_cuda = True
    assert engine.generate([Request([1, 300, 301], params=SamplingParams(3))])
    assert engine.statistics().kv_bytes == 0
