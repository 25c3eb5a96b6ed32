"""With a decoder in 8 and 4 bit, tokens equal one-at-a-time `generate` of the dequantized model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.engine import Engine
from llava.model.builder import load_pretrained_model
from tests.engine import test_engine
from tests.engine.conftest import Solo, greedy
from tests.engine.test_engine import (
    test_a_seed_fixes_the_answer_for_any_batch,
    test_a_stop_string_ends_the_answer_and_the_cached_prefix_is_correct,
    test_chunked_prefill_of_a_long_prompt_does_not_delay_the_others,
    test_requests_may_come_from_other_threads,
    test_shared_prefixes_are_computed_once,
    test_stop_strings_cut_the_text_and_free_the_row,
    test_the_next_turn_reuses_the_last,
)
from tests.engine.test_packed import dequantized
from tests.tiny import make_chat

__all__ = [
    "test_a_seed_fixes_the_answer_for_any_batch",
    "test_a_stop_string_ends_the_answer_and_the_cached_prefix_is_correct",
    "test_chunked_prefill_of_a_long_prompt_does_not_delay_the_others",
    "test_requests_may_come_from_other_threads",
    "test_shared_prefixes_are_computed_once",
    "test_stop_strings_cut_the_text_and_free_the_row",
    "test_the_next_turn_reuses_the_last",
]


@pytest.fixture(scope="module", params=[8, 4], ids=["8bit", "4bit"])
def both(request: Any, tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(tokenizer, model, image_processor) with a quantized decoder, and the dequantized model."""
    sizes: dict[str, Any] = {"initializer_range": 0.25, "hidden_size": 64, "intermediate_size": 128}
    directory = make_chat(tmp_path_factory.mktemp("packed") / "chat", tiny_dirs["tower"], **sizes)
    loaded = load_pretrained_model(directory, device="cpu", load_8bit=request.param == 8, load_4bit=request.param == 4)[
        :3
    ]
    return loaded, dequantized(load_pretrained_model(directory, device="cpu")[1], loaded[1])


@pytest.fixture(scope="module")
def parts(both: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    tokenizer, model, processor = both[0]
    assert Engine(model, tokenizer, processor).model_runner.native is not None  # type: ignore[attr-defined]
    return model, tokenizer, processor


@pytest.fixture(scope="module")
def bytes_per_token(parts: tuple[Any, Any, Any]) -> int:
    return Engine(*parts).model_runner.spec.bytes_per_token


@pytest.fixture(scope="module")
def solo(both: tuple[Any, Any]) -> Solo:
    return greedy(both[1])


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule_equals_one_at_a_time(
    make_engine: Callable[..., Engine], solo: Solo, bytes_per_token: int, data: st.DataObject
) -> None:
    """Any order of arrival, cancellation and refusal yields the same tokens, within all budgets, and leaks nothing."""
    test_engine.test_any_schedule_equals_one_at_a_time.hypothesis.inner_test(make_engine, solo, bytes_per_token, data)  # type: ignore[attr-defined]
