"""KV cache: rows are added, grow and are removed, and each keeps its content."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.engine.cache import CacheSpec, KVCache, LRUCache
from llava.engine.packing import DecodeStep


class DirtySpec(CacheSpec):
    """Uninitialised memory is NaN, which would reach the output from a masked slot."""

    def empty(self, rows: int, slots: int) -> Tensor:
        return super().empty(rows, slots).fill_(torch.nan)


SPEC = DirtySpec(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))


def content(cache: KVCache, row: int) -> Tensor:
    """(layers, 2, kv_heads, length, head_dim) of a row."""
    return cache.data[:, :, row, :, cache.end - cache.lengths[row] : cache.end]


def step(cache: KVCache, rows: list[Tensor]) -> None:
    """Write a new token for every row through `update`, and check the keys and values that attention reads."""
    mask = DecodeStep([0] * len(rows), cache).visible()
    new = torch.randn(2, 2, len(rows), 1, 1, 2)  # (layers, 2, B, H, 1, D)
    for layer in range(2):
        keys, values = cache.update(new[layer, 0], new[layer, 1], layer)
        assert keys.shape[-2] == cache.get_seq_length() + 1
        for row, expected in enumerate(rows):
            seen = torch.ones(keys.shape[-2], dtype=torch.bool) if mask is None else mask[row].bool()
            whole = torch.cat([expected, new[:, :, row]], dim=-2)
            assert torch.equal(keys[row][:, seen], whole[layer, 0])
            assert torch.equal(values[row][:, seen], whole[layer, 1])
    cache.advance()
    for row in range(len(rows)):
        rows[row] = torch.cat([rows[row], new[:, :, row]], dim=-2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_rows_keep_their_content(data: st.DataObject) -> None:
    cache, rows = KVCache(SPEC, max_rows=data.draw(st.sampled_from([0, 5]))), list[Tensor]()
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["join", "drop", "step"])):
            case "join":
                lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
                source = torch.randn(2, 2, len(lengths), 1, max(lengths), 2)
                cache.join(source, lengths)
                rows += [source[:, :, index, :, :length] for index, length in enumerate(lengths)]
            case "drop" if rows:
                row = data.draw(st.integers(0, len(rows) - 1))
                cache.drop(row)
                rows[row] = rows[-1]
                rows.pop()
            case "step" if rows:
                for _ in range(data.draw(st.integers(1, 40))):
                    step(cache, rows)
        assert cache.lengths == [row.shape[-2] for row in rows]
        assert cache.get_seq_length() == max(cache.lengths, default=0)  # no unused token slot
        assert cache.data[:, :, : len(rows), :, cache.start : cache.end].isfinite().all()
        for row, expected in enumerate(rows):
            assert torch.equal(content(cache, row), expected)


def test_growth_is_geometric() -> None:
    cache, copies = KVCache(SPEC), 0
    cache.join(torch.randn(2, 2, 1, 1, 10, 2), [10])
    for _ in range(2000):
        before = cache.data.data_ptr()
        cache.make_room()
        cache.advance()
        copies += cache.data.data_ptr() != before
    assert copies <= 12


def test_an_idle_cache_is_reused() -> None:
    cache = KVCache(SPEC)
    cache.join(torch.randn(2, 2, 3, 1, 50, 2), [50, 40, 30])
    buffer = cache.data.data_ptr()
    for _ in range(3):
        cache.drop(0)
    cache.join(torch.randn(2, 2, 3, 1, 60, 2), [60, 1, 2])
    assert cache.data.data_ptr() == buffer and cache.lengths == [60, 1, 2]


def test_no_token_slot_is_beyond_the_context() -> None:
    cache = KVCache(replace(SPEC, context_length=100))
    cache.join(torch.randn(2, 2, 2, 1, 70, 2), [70, 10])
    assert cache.data.shape[4] == 100  # not 70 * 1.5
    for _ in range(30):
        cache.make_room()
        cache.advance()
    assert cache.lengths == [100, 40] and cache.data.shape[4] == 100


def test_an_empty_cache_releases_a_large_buffer() -> None:
    large = CacheSpec(layers=2, kv_heads=8, head_dim=1024, dtype=torch.float32, device=torch.device("cpu"))
    for spec, kept in ((SPEC, True), (large, False)):
        cache = KVCache(spec)
        cache.join(spec.empty(1, 1000), [1000])
        cache.release()
        assert cache.data.nbytes > 0, "a row is left"
        cache.drop(0)
        cache.release()
        assert (cache.data.nbytes > 0) is kept
        cache.join(spec.empty(1, 5), [5])
        assert cache.lengths == [5]


def test_store_keeps_to_its_budget() -> None:
    store = LRUCache(budget=100)
    for key in "abc":
        store.put(key, torch.zeros(10))  # 40 bytes each
    assert "a" not in store and len(store) == 2 and store.bytes == 80
    assert store.get("b") is not None  # now c is the oldest
    store.put("d", torch.zeros(10))
    assert "c" not in store and "b" in store
    store.put("huge", torch.zeros(26))
    assert "huge" not in store and store.bytes <= 100
