"""Choosing tokens: the nucleus, seeds, and the refusal of parameters that make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.engine import SamplingParams
from llava.engine.sampling import choose, make_generator, nucleus
from llava.errors import RequestError


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), top_p=st.floats(0.01, 0.999), temperature=st.floats(0.1, 5))
def test_nucleus_is_the_smallest_set_of_enough_mass(seed: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    everything = torch.softmax(logits / temperature, -1)
    kept = nucleus(logits, temperature, top_p)
    chosen = kept > 0
    assert kept.sum().item() == pytest.approx(1, abs=1e-5)
    assert everything[chosen].sum() >= top_p - 1e-5
    assert everything[chosen].sum() - everything[chosen].min() < top_p + 1e-5
    assert everything[chosen].min() >= everything[~chosen].max() if (~chosen).any() else True
    torch.testing.assert_close(kept[chosen], everything[chosen] / everything[chosen].sum())


def test_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    generator = make_generator(params)
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    counts = torch.bincount(torch.tensor([choose(logits, [params], [generator])[0] for _ in range(4000)]), minlength=3)
    torch.testing.assert_close(counts / 4000, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


def test_greedy_rows_are_not_disturbed_by_sampled_ones() -> None:
    logits = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    hot, cold = SamplingParams(temperature=2.0, seed=0), SamplingParams()
    assert make_generator(cold) is None
    assert all(choose(logits, [hot, cold], [make_generator(hot), None])[1] == 0 for _ in range(20))


@pytest.mark.parametrize("temperature", [1e-9, 1e-45])
def test_the_coldest_sampling_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=0)
    assert choose(torch.tensor([[5.0, 30.0, -7.0]]), [params], [make_generator(params)]) == [1]


def test_a_row_of_no_finite_logits_has_no_token() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, -math.inf], [math.inf, 0.0, 0.0]])
    warm = SamplingParams(temperature=0.01, seed=0)
    assert choose(logits, [warm] * 3, [make_generator(warm), make_generator(warm), None]) == [None, 1, None]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"seed": -1},
        {"num_beams": 0},
        {"stop": "###"},
        {"stop": None},
        {"stop": (1,)},
        {"max_new_tokens": 5.5},
        {"max_new_tokens": None},
        {"seed": "1"},
        {"temperature": "0"},
        {"top_p": None},
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(**options)
