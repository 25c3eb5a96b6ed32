"""The tree of known beginnings: what is found is what was stored, nothing is lost or kept beyond the budget."""

from __future__ import annotations

import gc
import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.engine.prefix_cache import MIN_SHARED, Node, Prefix, PrefixCache, num_tokens

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(
    lambda ids: tuple(id for id in ids for _ in "12345678")
)


def columns(elements: tuple[int, ...]) -> Tensor:
    """(1, 1, 1, L, 1): a number for every element that depends on all before it, as keys and values do."""
    value, out = 0.0, []
    for element in elements:
        value = (value * 31 + element + 1) % 1009
        out.append(value)
    return torch.tensor(out).view(1, 1, 1, -1, 1)


def content(chain: Prefix) -> Tensor:
    return torch.cat([span.data for span in chain], dim=-2) if chain else torch.empty(1, 1, 1, 0, 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sequences=st.lists(SEQUENCES, min_size=1, max_size=12), budget=st.sampled_from([0, 200, 600, 10**6]))
def test_what_is_found_is_what_was_stored(sequences: list[tuple[int, ...]], budget: int) -> None:
    store, known = PrefixCache(budget), list[tuple[int, ...]]()
    for elements in sequences:
        chain, done = store.match(elements, len(elements) - 1)
        assert num_tokens(chain) == done < len(elements)
        assert torch.equal(content(chain), columns(elements)[..., :done, :])
        if budget == 10**6:
            shared = max((common(elements[:-1], other) for other in known), default=0)
            assert shared - done < 2 * MIN_SHARED  # only the last, short pieces may be left out
        widths = [1] * (len(elements) - done)
        store.insert(chain, elements[done:], widths, columns(elements)[..., done:, :].clone())
        known.append(elements)
        assert store.bytes <= budget and store.bytes == sum(data_of(segment).nbytes for segment in store._segments)
    store.clear()
    assert store.bytes == len(store) == 0 and not store._root.children


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return next((at for at, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), min(len(left), len(right)))


def data_of(segment: Node) -> Tensor:
    assert segment.data is not None
    return segment.data


def test_a_beginning_in_common_does_not_keep_others_out() -> None:
    store = PrefixCache(10**6)
    first, second = (7, *range(100, 140)), (7, *range(200, 240))  # only one element alike
    for elements in (first, second):
        store.add(elements, [1] * 41, columns(elements), 0)
    for elements in (first, second):
        chain, done = store.match(elements, 41)
        assert done == 41 and torch.equal(content(chain), columns(elements))


def test_what_is_evicted_is_freed_when_its_last_user_goes() -> None:
    store = PrefixCache(200)
    elements = tuple(range(50))
    segment = store.insert((), elements, [1] * 50, columns(elements))
    chain, _ = store.match(elements, 50)
    watch = weakref.ref(segment)
    store.insert((), tuple(range(100, 150)), [1] * 50, columns(elements))
    assert not segment.stored and store.bytes == 200 and len(store) == 1
    del segment
    gc.collect()
    assert watch() is not None and num_tokens(chain) == 50
    del chain
    gc.collect()
    assert watch() is None


def test_ancestors_stay_as_long_as_their_descendants() -> None:
    store = PrefixCache(400)
    trunk = tuple(range(40))
    store.insert((), trunk, [1] * 40, columns(trunk))
    for branch in range(5):
        elements = (*trunk, *range(1000 * branch + 100, 1000 * branch + 120))
        chain, done = store.match(elements, 59)
        assert done == 40
        store.insert(chain, elements[40:], [1] * 20, columns(elements)[..., 40:, :].clone())
        assert store.match(elements, 60)[1] == 60
    assert store.bytes <= 400 and store.match(trunk, 40)[1] == 40
