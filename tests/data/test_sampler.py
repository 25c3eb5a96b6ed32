"""Sampling orders: the published ones, and every index exactly once for any lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.sampler import (
    LengthGroupedSampler,
    _split_rows,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)

LENGTHS = st.lists(st.integers(-40, 40), min_size=1, max_size=60)


@pytest.mark.golden
def test_golden_orders(golden_dir: Path) -> None:
    book = json.loads((golden_dir / "train" / "samplers.json").read_text())
    for case in book["cases"]:
        lengths, batch, world = case["lengths"], case["batch_size"], case["world_size"]
        torch.manual_seed(case["seed"])
        generator = torch.Generator().manual_seed(case["seed"]) if case["generator"] else None
        if case["kind"] == "length":
            order = get_length_grouped_indices(lengths, batch, world, generator=generator)
        elif case["kind"] == "modality":
            order = get_modality_length_grouped_indices(lengths, batch, world)
        else:
            order = list(LengthGroupedSampler(batch, world, lengths=lengths, group_by_modality=True))
        if case.get("reference_defect"):
            assert sorted(order) == list(range(len(lengths)))
        else:
            assert order == case["order"], case["id"]


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_every_index_once_and_the_same_on_every_rank(
    lengths: list[int], batch: int, world: int, modality: bool, seed: int
) -> None:
    samplers = [LengthGroupedSampler(batch, world, lengths, None, modality, seed) for _ in range(2)]
    first = list(samplers[0])
    torch.manual_seed(123)  # a rank whose global state differs
    assert list(samplers[1]) == first
    assert sorted(first) == list(range(len(lengths))) == list(range(len(samplers[0])))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 4))
def test_at_most_two_megabatches_mix_modalities(lengths: list[int], batch: int, world: int) -> None:
    order = get_modality_length_grouped_indices(lengths, batch, world)
    size = batch * world
    runs = [order[start : start + size] for start in range(0, len(order), size)]
    mixed = [number for number, run in enumerate(runs) if len({lengths[i] > 0 for i in run}) > 1]
    assert set(mixed) <= {0, len(runs) - 1}


def test_a_single_modality_is_grouped_by_length() -> None:
    for sign in (1, -1):
        lengths = [sign * length for length in (5, 1, 9, 3, 7, 2, 8, 4)]
        torch.manual_seed(0)
        order = get_modality_length_grouped_indices(lengths, 2, 2)
        torch.manual_seed(0)
        assert order == get_length_grouped_indices([abs(length) for length in lengths], 2, 2)


def test_epochs_differ_and_repeat() -> None:
    sampler = LengthGroupedSampler(2, 2, list(range(1, 41)), seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_split_rows_equals_split_to_even_chunks(size: int, count: int, runs: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 9, runs * count * size)
    indices = draw.permutation(len(lengths)).reshape(runs, -1)
    split = _split_rows(indices, lengths, count)
    expected = [split_to_even_chunks(run, lengths.tolist(), count) for run in indices.tolist()]
    assert split.reshape(runs, count, size).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_even_chunks(lengths: list[int], count: int) -> None:
    indices = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    chunks = split_to_even_chunks(indices, lengths, count)
    assert len(chunks) == count
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


def test_lengths_are_required() -> None:
    with pytest.raises(ValueError, match="lengths must be given"):
        LengthGroupedSampler(1, 1)
