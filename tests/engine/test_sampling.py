"""Sampling: the top-p set, seeds, both sampling methods, and invalid parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.engine import SamplingParams
from llava.engine.sampling import NO_TOKEN, Sampler, argmax, make_generator, sample_top_p, top_p_candidates
from llava.errors import RequestError


def sample(logits: torch.Tensor, params: list[SamplingParams]) -> list[int]:
    found: list[int] = Sampler(params, [make_generator(one) for one in params]).sample(logits).tolist()
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), top_p=st.floats(0.01, 0.999), temperature=st.floats(0.1, 5))
def test_the_top_p_set_is_the_smallest_of_enough_mass(seed: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    everything = torch.softmax(logits / temperature, -1)
    tokens, probabilities = top_p_candidates(logits, temperature, top_p)
    chosen = torch.zeros(20, dtype=torch.bool).index_fill_(0, tokens, True)
    assert everything[chosen].sum() >= top_p - 1e-5
    assert everything[chosen].sum() - everything[chosen].min() < top_p + 1e-5
    assert everything[chosen].min() >= everything[~chosen].max() if (~chosen).any() else True
    assert torch.equal(probabilities, everything[tokens])


def draw_as_the_library(logits: torch.Tensor, params: SamplingParams) -> int:
    """One token by `torch.multinomial` over the whole vocabulary, everything sorted."""
    probabilities = torch.softmax(logits / params.temperature, -1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= params.top_p, 0.0)
    kept = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return int(torch.multinomial(kept / kept.sum(), 1, generator=make_generator(params)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), top_p=st.floats(0.05, 1), scale=st.floats(0.1, 10), vocabulary=st.integers(2, 3000))
def test_a_seed_draws_what_multinomial_draws(seed: int, top_p: float, scale: float, vocabulary: int) -> None:
    logits = scale * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    params = [SamplingParams(temperature=0.7, top_p=top_p, seed=seed + row) for row in range(3)]
    assert sample(logits, params) == [draw_as_the_library(row, one) for row, one in zip(logits, params, strict=True)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), top_p=st.floats(0.05, 1), temperature=st.floats(0.05, 5))
def test_the_batched_way_draws_by_the_inverse_of_the_distribution(seed: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    tokens, probabilities = top_p_candidates(logits[1], temperature, top_p)
    order = probabilities.argsort(descending=True, stable=True)
    ends = probabilities[order].cumsum(-1) / probabilities.sum()
    for draw in (0.0, 0.3, 0.9, 1 - 2**-24):
        columns = [torch.tensor([one, one]) for one in (temperature, top_p, draw)]
        found = int(sample_top_p(logits, *columns)[1])
        place = (tokens[order] == found).nonzero()
        assert len(place) == 1, "a token outside the set"
        first = ends[place.item() - 1] if place else 0.0
        assert first - 1e-5 <= draw <= ends[place.item()] + 1e-5


def test_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    generator = make_generator(params)
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    logits = torch.log(probabilities).unsqueeze(0)
    drawn = torch.cat([Sampler([params], [generator]).sample(logits) for _ in range(4000)])
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 4000, probabilities, atol=0.03, rtol=0)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    drawn = sample_top_p(logits.expand(4000, -1), torch.ones(4000), torch.ones(4000), uniform)
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 4000, probabilities, atol=0.03, rtol=0)


def test_greedy_rows_are_not_disturbed_by_sampled_ones() -> None:
    logits = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    hot, cold = SamplingParams(temperature=2.0, seed=0), SamplingParams()
    assert make_generator(cold) is None
    assert all(sample(logits, [hot, cold])[1] == 0 for _ in range(20))


def test_only_sampled_rows_draw_independently() -> None:
    warm = [SamplingParams(temperature=1.0, top_p=0.5, seed=seed) for seed in (1, 2)]
    generators = [make_generator(one) for one in warm]
    columns = Sampler([warm[0], SamplingParams(), warm[1]], [generators[0], None, generators[1]]).host_params()
    alone = [Sampler([one], [make_generator(one)]).host_params() for one in warm]
    assert columns[:2] == [[1.0, 0.0, 1.0], [0.5, 1.0, 0.5]]
    assert columns[2] == [alone[0][2][0], 0.0, alone[1][2][0]]
    assert Sampler([SamplingParams()], [None]).host_params() == []


@pytest.mark.parametrize("temperature", [1e-9, 1e-45])
def test_the_coldest_sampling_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[5.0, 30.0, -7.0]])
    assert sample(logits, [SamplingParams(temperature=temperature, seed=0)]) == [1]
    assert sample_top_p(logits, torch.tensor([temperature]), torch.ones(1), torch.tensor([0.999])).tolist() == [1]


def test_the_first_of_equal_logits_wins() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [-torch.inf, -torch.inf, -torch.inf], [torch.nan, 3.0, torch.nan]])
    for dtype in (torch.float32, torch.bfloat16):
        assert argmax(logits.to(dtype)).tolist() == [1, 0, 0]


def test_a_row_without_finite_logits_has_no_token() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, -math.inf], [math.inf, 0.0, 0.0]])
    warm = SamplingParams(temperature=0.01, seed=0)
    assert sample(logits, [warm, warm, SamplingParams()]) == [NO_TOKEN, 1, NO_TOKEN]
    columns = [torch.tensor([one] * 3) for one in (0.01, 0.7, 0.5)]
    assert sample_top_p(logits, *columns)[1] == 1  # and nothing is looked up outside the vocabulary


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
def test_invalid_parameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(**options)
