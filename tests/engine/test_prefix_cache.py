"""The radix tree returns the stored keys and values, within its budget, and frees evicted nodes."""

from __future__ import annotations

import gc
import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.engine.prefix_cache import MIN_SHARED, Prefix, PrefixCache, num_tokens

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(
    lambda ids: tuple(id for id in ids for _ in "12345678")
)


def keys_values(cache_keys: tuple[int, ...]) -> Tensor:
    """(1, 1, 1, L, 1): a number per cache key that depends on all keys before it, as keys and values do."""
    value, out = 0.0, []
    for key in cache_keys:
        value = (value * 31 + key + 1) % 1009
        out.append(value)
    return torch.tensor(out).view(1, 1, 1, -1, 1)


def content(prefix: Prefix) -> Tensor:
    return torch.cat([match.data for match in prefix], dim=-2) if prefix else torch.empty(1, 1, 1, 0, 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sequences=st.lists(SEQUENCES, min_size=1, max_size=12), budget=st.sampled_from([0, 200, 600, 10**6]))
def test_matches_return_the_stored_data(sequences: list[tuple[int, ...]], budget: int) -> None:
    store, known = PrefixCache(budget), list[tuple[int, ...]]()
    for cache_keys in sequences:
        prefix, done = store.match(cache_keys, len(cache_keys) - 1)
        assert num_tokens(prefix) == done < len(cache_keys)
        assert torch.equal(content(prefix), keys_values(cache_keys)[..., :done, :])
        if budget == 10**6:
            shared = max((common(cache_keys[:-1], other) for other in known), default=0)
            assert shared - done < 2 * MIN_SHARED  # only short last matches may be missing
        store.insert(prefix, cache_keys, [1] * len(cache_keys), keys_values(cache_keys)[..., done:, :].clone())
        known.append(cache_keys)
        assert store.bytes <= budget and store.bytes == sum(node.data.nbytes for node in store._nodes)
    store.clear()
    assert store.bytes == len(store) == 0 and not store._root.children


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return next((at for at, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), min(len(left), len(right)))


def test_a_common_prefix_does_not_block_other_branches() -> None:
    store = PrefixCache(10**6)
    first, second = (7, *range(100, 140)), (7, *range(200, 240))  # one common key
    for cache_keys in (first, second):
        store.add(cache_keys, [1] * 41, keys_values(cache_keys), 0)
    for cache_keys in (first, second):
        prefix, done = store.match(cache_keys, 41)
        assert done == 41 and torch.equal(content(prefix), keys_values(cache_keys))


def test_an_evicted_node_is_freed_with_its_last_user() -> None:
    store = PrefixCache(200)
    cache_keys = tuple(range(50))
    node = store.insert((), cache_keys, [1] * 50, keys_values(cache_keys))
    prefix, _ = store.match(cache_keys, 50)
    watch = weakref.ref(node)
    store.insert((), tuple(range(100, 150)), [1] * 50, keys_values(cache_keys))
    assert not node.in_tree and store.bytes == 200 and len(store) == 1
    del node
    gc.collect()
    assert watch() is not None and num_tokens(prefix) == 50
    del prefix
    gc.collect()
    assert watch() is None


def test_ancestors_outlive_their_descendants() -> None:
    store = PrefixCache(400)
    trunk = tuple(range(40))
    store.insert((), trunk, [1] * 40, keys_values(trunk))
    for branch in range(5):
        cache_keys = (*trunk, *range(1000 * branch + 100, 1000 * branch + 120))
        prefix, done = store.match(cache_keys, 59)
        assert done == 40
        store.insert(prefix, cache_keys, [1] * 60, keys_values(cache_keys)[..., 40:, :].clone())
        assert store.match(cache_keys, 60)[1] == 60
    assert store.bytes <= 400 and store.match(trunk, 40)[1] == 40
