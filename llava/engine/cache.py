"""Storage of keys and values: the rows of the running batch, which come and go, and a store with a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llava.engine.attention import Shared
from llava.engine.prefix_cache import Chain, Span, tokens_of
from llava.model.transfer import upload_columns


class ShardedKV:
    """Tensors (layers of one device, …) as one (all layers, …), which can be sliced in all places but the first."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def empty(cls, devices: Sequence[torch.device], shape: Sequence[int], dtype: torch.dtype) -> ShardedKV:
        """Of `shape` behind the layers, whose devices are given; neighbours on one device share a tensor."""
        return cls(
            [torch.empty((len(list(some)), *shape), dtype=dtype, device=device) for device, some in groupby(devices)]
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self.parts)), *self.parts[0].shape[1:]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        """That of the first layer."""
        return self.parts[0].device

    def __getitem__(self, index: Any) -> Any:
        """One layer's tensor for a whole number in the first place, else all layers'."""
        index = index if isinstance(index, tuple) else (index,)
        layer = index[0]
        if not isinstance(layer, int):
            return ShardedKV([part[index] for part in self.parts])
        for part in self.parts:
            if layer < len(part):
                return part[(layer, *index[1:])]
            layer -= len(part)
        raise IndexError(f"layer {index[0]} of {self.shape[0]}")

    def __setitem__(self, index: Any, value: Any) -> None:
        for at, part in enumerate(self.parts):
            part[index] = value.parts[at] if isinstance(value, ShardedKV) else value

    def clone(self) -> ShardedKV:
        return ShardedKV([part.clone() for part in self.parts])


# --- Storage of keys and values: the rows of the running batch, which come and go, and a store with a budget ----------


_SLACK = 64
_IDLE_BYTES = 64 * 2**20  # a buffer up to this size is kept when idle


@dataclass(frozen=True)
class CacheSpec:
    """Sizes of one model's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device  # of the embeddings
    layer_devices: tuple[torch.device, ...] = ()  # where they are not all that one
    context_length: int | None = None  # no row grows longer

    @property
    def column_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def empty(self, rows: int, columns: int) -> Tensor:
        """(layers, 2, rows, kv_heads, columns, head_dim), to be written before it is read, also what masks hide."""
        shape = (2, rows, self.kv_heads, columns, self.head_dim)
        if self.layer_devices:
            return cast(Tensor, ShardedKV.empty(self.layer_devices, shape, self.dtype))
        return torch.empty((self.layers, *shape), dtype=self.dtype, device=self.device)


class KVCache(Cache):
    """Keys and values of the running rows in one buffer, aligned on a common last column.

    Row r of length n occupies columns `end - n … end - 1`; what lies to its left is masked. A decode step writes one
    column in place; a row joins by one copy and leaves by moving the last row into its place. The buffer grows
    geometrically and is never copied in an ordinary step. During prefill the same class serves as a plain rectangle
    starting at column 0. The library's models read it through `update`; `advance` commits a step after the last layer.

    A row may stand behind a chain of shared segments, which is not copied into it: `chains`. Its length and columns are
    its own then, without the chain.
    """

    def __init__(self, spec: CacheSpec, rows: int = 0, columns: int = 0, budget: int | None = None) -> None:
        """`budget` bounds the bytes of the buffer, as long as the rows themselves fit into it."""
        self.spec = spec
        self.budget = budget
        self.data = spec.empty(rows, columns)
        self.lengths: list[int] = []
        self.chains: list[Chain] = []
        self.start = self.end = 0
        self._shared: dict[torch.device, list[Shared]] = {}

    @classmethod
    def for_prefill(cls, spec: CacheSpec, rows: int, prefix: int, columns: int) -> KVCache:
        """A rectangle of `rows` whose first `prefix` columns the caller fills; `columns` counts all of them."""
        cache = cls(spec, rows, columns)
        cache.lengths = [prefix] * rows
        cache.chains = [()] * rows
        cache.end = prefix
        return cache

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.end - self.start

    def get_max_length(self) -> int | None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write new columns (B, kv_heads, T, head_dim) of a layer and return all its keys and values so far."""
        stop = self.end + key_states.shape[-2]
        layer = self.data[layer_idx, :, : len(self.lengths)]  # (2, B, H, columns, D)
        layer[0, :, :, self.end : stop] = key_states
        layer[1, :, :, self.end : stop] = value_states
        return layer[0, :, :, self.start : stop], layer[1, :, :, self.start : stop]

    def advance(self) -> None:
        """Commit one decode step."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def positions(self) -> list[int]:
        """The position of every row's next token."""
        return [self.position(row) for row in range(len(self.lengths))]

    def position(self, row: int) -> int:
        """How many tokens a row has behind it, shared or its own."""
        return tokens_of(self.chains[row]) + self.lengths[row]

    def shared(self, device: torch.device) -> list[Shared]:
        """The prefixes shared by rows, for `attend` in a layer on `device`."""
        if device not in self._shared:
            self._shared[device] = shared_parts(self.chains, device)
        return self._shared[device]

    def row(self, index: int) -> Tensor:
        """(layers, 2, kv_heads, length, head_dim) of a row's own columns, a view."""
        return self.data[:, :, index, :, self.end - self.lengths[index] : self.end]

    def join(self, source: Tensor, lengths: Sequence[int], chains: Sequence[Chain] = ()) -> None:
        """Add rows from (layers, 2, n, kv_heads, T, head_dim), each left-aligned with its own length."""
        first = len(self.lengths)
        self._reserve(first + len(lengths), max(lengths))
        for index, length in enumerate(lengths):
            row = self.data[:, :, first + index]
            row[..., : self.end - length, :] = 0
            row[..., self.end - length : self.end, :] = source[:, :, index, :, :length]
        self.lengths.extend(lengths)
        self.chains.extend(chains or [()] * len(lengths))
        self._shared = {}
        self._trim()

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its number."""
        last = len(self.lengths) - 1
        if row != last:
            self.data[:, :, row, :, self.start : self.end] = self.data[:, :, last, :, self.start : self.end]
            self.lengths[row] = self.lengths[last]
            self.chains[row] = self.chains[last]
        self.lengths.pop()
        self.chains.pop()
        self._shared = {}
        self._trim()

    def make_room(self) -> None:
        """Guarantee a free column for the next step."""
        self._reserve(len(self.lengths), 0)

    def release(self) -> None:
        """Free the buffer when idle; a small one is kept."""
        if not self.lengths and self.data.nbytes > _IDLE_BYTES:
            self.data = self.spec.empty(0, 0)
            self.start = self.end = 0

    def _trim(self) -> None:
        self.start = self.end - max(self.lengths, default=0)

    def _reserve(self, rows: int, length: int) -> None:
        """Capacity for `rows` rows, for a row of `length` ending at `end`, and for one column more."""
        capacity, columns = self.data.shape[2], self.data.shape[4]
        width = max(length, self.end - self.start)
        if not self.lengths and rows <= capacity and width < columns:
            self.start = self.end = width
            return
        if rows <= capacity and width <= self.end < columns:
            return
        rows_now, live = len(self.lengths), self.end - self.start
        if not rows_now:
            self.data = self.spec.empty(0, 0)  # frees the old buffer before the new one is allocated
        if rows > capacity:
            capacity = max(rows, 2 * capacity)
        columns = width + max(_SLACK, width // 2)
        if self.spec.context_length is not None:
            columns = max(width + 1, min(columns, self.spec.context_length))
        if self.budget is not None and capacity * columns * self.spec.column_bytes > self.budget:
            capacity = max(rows, rows_now)
            columns = max(width + 1, min(columns, self.budget // (capacity * self.spec.column_bytes)))
        grown = self.spec.empty(capacity, columns)
        if rows_now:
            grown[:, :, :rows_now, :, : width - live] = 0
            grown[:, :, :rows_now, :, width - live : width] = self.data[:, :, :rows_now, :, self.start : self.end]
        self.data, self.start, self.end = grown, width - live, width


def shared_parts(chains: Sequence[Chain], device: torch.device) -> list[Shared]:
    """Rows by the segments they stand behind."""
    found: dict[Span, list[int]] = {}
    for row, chain in enumerate(chains):
        for span in chain:
            found.setdefault(span, []).append(row)
    parts = []
    for span, rows in found.items():
        together = rows[-1] - rows[0] == len(rows) - 1
        where = slice(rows[0], rows[-1] + 1) if together else upload_columns([rows], device)[0]
        parts.append(Shared(where, span.data))
    return parts


class LRUCache:
    """Tensors by key, least recently used out first, within a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._items: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable) -> Tensor | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep `value`, evicting older ones; one larger than the whole budget is not kept."""
        size = value.nbytes
        if key in self._items or size > self.budget:
            return
        while self.bytes + size > self.budget:
            self.bytes -= self._items.popitem(last=False)[1].nbytes
        self._items[key] = value
        self.bytes += size
