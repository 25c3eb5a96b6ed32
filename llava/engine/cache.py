"""KV cache of the running batch, an LRU cache of tensors, and the memory limits of the engine's caches."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import EllipsisType
from typing import Final, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llava.engine.attention import SharedPrefix
from llava.engine.prefix_cache import Prefix, PrefixMatch, num_tokens
from llava.model.transfer import upload_columns

_SLACK = 64  # token slots allocated beyond those in use
_IDLE_BYTES = 64 * 2**20  # an idle cache up to this size keeps its buffer
_UNCOMMITTED_BYTES: Final = 4 * 2**30
_STORE_BYTES: Final = 512 * 2**20  # prefix cache and feature cache on other devices than CUDA
_PREFILL_TOKENS: Final = 8192
_LEAST_PREFILL_TOKENS: Final = 512
# Fractions of the free memory; the rest is for activations. A KV cache that grows by half temporarily takes 5/3 of its
# final size.
_KV_SHARE: Final = 0.35
_PREFIX_SHARE: Final = 0.2
_FEATURE_SHARE: Final = 0.02
_PREFILL_SHARE: Final = 0.1
_CONTEXT_SHARE: Final = 0.45  # KV cache, if `_KV_SHARE` does not hold one full context
_LEAST_PREFIX_SHARE: Final = 0.05
_CACHES_SHARE: Final = 0.85  # KV and prefix cache while the former grows
_GROWTH: Final = 5 / 3

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType | None, ...]


class ShardedKV:
    """A tensor (layers, …) whose layers are on several devices: one part (layers of a device, …) per device.

    It is indexed like the whole tensor, with an integer or a full slice in the first place.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self.parts)), *self.parts[0].shape[1:]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Device of the first layer."""
        return self.parts[0].device

    def __getitem__(self, index: Index) -> Tensor | ShardedKV:
        index = index if isinstance(index, tuple) else (index,)
        layer = index[0]
        if not isinstance(layer, int):
            return ShardedKV([part[index] for part in self.parts])
        for part in self.parts:
            if layer < len(part):
                return part[(layer, *index[1:])]
            layer -= len(part)
        raise IndexError(f"layer {index[0]} of {self.shape[0]}")

    def __setitem__(self, index: Index, value: Tensor | ShardedKV | float) -> None:
        if isinstance(index if not isinstance(index, tuple) else index[0], int):
            raise TypeError(f"ShardedKV cannot be assigned at {index!r}, in one layer; use kv[layer][...] = value")
        for at, part in enumerate(self.parts):
            part[index] = value.parts[at] if isinstance(value, ShardedKV) else value

    def clone(self) -> ShardedKV:
        return ShardedKV([part.clone() for part in self.parts])


@dataclass(frozen=True)
class CacheSpec:
    """Shape, dtype and devices of a model's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device  # of the embeddings
    layer_devices: tuple[torch.device, ...] = ()  # of a model split over devices
    context_length: int | None = None

    @property
    def bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def empty(self, rows: int, slots: int) -> Tensor:
        """Uninitialised keys and values (layers, 2, rows, kv_heads, slots, head_dim).

        Write every slot before it is read, also masked ones: a NaN there would reach the output.
        """
        shape = (2, rows, self.kv_heads, slots, self.head_dim)
        shards = groupby(self.layer_devices or (self.device,) * self.layers)
        parts = [torch.empty((len(list(some)), *shape), dtype=self.dtype, device=device) for device, some in shards]
        return cast(Tensor, ShardedKV(parts)) if self.layer_devices else parts[0]


class KVCache(Cache):
    """KV cache of the running rows: one buffer (layers, 2, rows, kv_heads, slots, head_dim), aligned on the last token.

    Row r of length n occupies token slots `end - n … end - 1`; the slots to its left are masked. A decode step writes
    one slot in place, a row is added with one copy, and a removed row is replaced by the last one. The buffer grows
    geometrically and is never copied in an ordinary step.

    A row may follow a cached prefix, which is not copied into it: `prefixes`. Its length then counts the tokens behind
    the prefix. Models of transformers read the cache through `update`; `advance` commits a step after the last layer.
    """

    def __init__(
        self, spec: CacheSpec, rows: int = 0, slots: int = 0, budget: int | None = None, max_rows: int = 0
    ) -> None:
        """`budget` limits the bytes of the buffer, as long as the rows themselves fit into it.

        On the CPU, where unused memory is not committed, the buffer has room for `max_rows`, if they take at most
        4 GiB, so that a row that joins does not copy the others.
        """
        self.spec = spec
        self.budget = budget
        self._max_rows = max_rows if spec.device.type == "cpu" else 0
        self._used_rows = 0  # most rows since the buffer was allocated
        self.data = spec.empty(rows, slots)
        self.lengths: list[int] = []
        self.prefixes: list[Prefix] = []
        self.start = self.end = 0
        self._shared: dict[torch.device, list[SharedPrefix]] = {}

    @classmethod
    def for_prefill(cls, spec: CacheSpec, rows: int, filled: int, slots: int) -> KVCache:
        """A left-aligned cache of `rows` of which the caller writes the first `filled` of `slots`."""
        cache = cls(spec, rows, slots)
        cache.lengths = [filled] * rows
        cache.prefixes = [()] * rows
        cache.end = filled
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer; with `max_rows` on the CPU, of the rows used so far."""
        rows = self.data.shape[2]
        return self.data.nbytes * self._used_rows // rows if self._max_rows and rows else self.data.nbytes

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.end - self.start

    def get_max_length(self) -> int | None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, kv_heads, T, head_dim) of new tokens of a layer; return all of its rows so far."""
        stop = self.end + key_states.shape[-2]
        layer = self.data[layer_idx, :, : len(self.lengths)]  # (2, B, kv_heads, slots, head_dim)
        layer[0, :, :, self.end : stop] = key_states
        layer[1, :, :, self.end : stop] = value_states
        return layer[0, :, :, self.start : stop], layer[1, :, :, self.start : stop]

    def advance(self) -> None:
        """Commit one decode step."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def positions(self) -> list[int]:
        """Position of every row's next token."""
        return [self.position(row) for row in range(len(self.lengths))]

    def position(self, row: int) -> int:
        """Cached tokens of a row, its prefix included."""
        return num_tokens(self.prefixes[row]) + self.lengths[row]

    def shared(self, device: torch.device) -> list[SharedPrefix]:
        """Prefixes of the rows, for `attend` in a layer on `device`."""
        if device not in self._shared:
            self._shared[device] = shared_prefixes(self.prefixes, device)
        return self._shared[device]

    def row(self, index: int) -> Tensor:
        """A view (layers, 2, kv_heads, length, head_dim) of a row's tokens behind its prefix."""
        return self.data[:, :, index, :, self.end - self.lengths[index] : self.end]

    def join(self, source: Tensor, lengths: Sequence[int], prefixes: Sequence[Prefix] = ()) -> None:
        """Add rows from left-aligned keys and values (layers, 2, n, kv_heads, T, head_dim)."""
        first = len(self.lengths)
        self._reserve(first + len(lengths), max(lengths))
        self._used_rows = max(self._used_rows, first + len(lengths))
        start = min(self.start, self.end - max(lengths))
        self.data[:, :, :first, :, start : self.start] = 0
        for index, length in enumerate(lengths):
            row = self.data[:, :, first + index]
            row[..., start : self.end - length, :] = 0
            row[..., self.end - length : self.end, :] = source[:, :, index, :, :length]
        self.lengths.extend(lengths)
        self.prefixes.extend(prefixes or [()] * len(lengths))
        self._shared = {}
        self._trim()

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its index."""
        last = len(self.lengths) - 1
        if row != last:
            self.data[:, :, row, :, self.start : self.end] = self.data[:, :, last, :, self.start : self.end]
            self.lengths[row] = self.lengths[last]
            self.prefixes[row] = self.prefixes[last]
        self.lengths.pop()
        self.prefixes.pop()
        self._shared = {}
        self._trim()

    def make_room(self) -> None:
        """Guarantee a free token slot for the next step."""
        self._reserve(len(self.lengths), 0)

    def release(self) -> None:
        """Free a large buffer if no rows are left."""
        if not self.lengths and self.data.nbytes > _IDLE_BYTES:
            self.data = self.spec.empty(0, 0)
            self.start = self.end = 0

    def _trim(self) -> None:
        self.start = self.end - max(self.lengths, default=0)

    def _reserve(self, rows: int, length: int) -> None:
        """Ensure capacity for `rows` rows, for a row of `length` that ends at `end`, and for one more token."""
        capacity, slots = self.data.shape[2], self.data.shape[4]
        width = max(length, self.end - self.start)
        if not self.lengths and rows <= capacity and width < slots:
            self.start = self.end = width
            return
        if rows <= capacity and width <= self.end < slots:
            return
        rows_now, live = len(self.lengths), self.end - self.start
        if not rows_now:
            self.data = self.spec.empty(0, 0)  # frees the old buffer before the new one is allocated
        slots = width + max(_SLACK, width // 2)
        if self.spec.context_length is not None:
            slots = max(width + 1, min(slots, self.spec.context_length))
        if rows > capacity:
            limit = min(self.budget or math.inf, _UNCOMMITTED_BYTES)
            roomy = 0 < self._max_rows * slots * self.spec.bytes_per_token <= limit
            capacity = max(rows, self._max_rows if roomy else 2 * capacity)
        if self.budget is not None and capacity * slots * self.spec.bytes_per_token > self.budget:
            capacity = max(rows, rows_now)
            slots = max(width + 1, min(slots, self.budget // (capacity * self.spec.bytes_per_token)))
        grown = self.spec.empty(capacity, slots)
        if rows_now:
            grown[:, :, :rows_now, :, width - live : width] = self.data[:, :, :rows_now, :, self.start : self.end]
        self.data, self.start, self.end, self._used_rows = grown, width - live, width, rows_now


def shared_prefixes(prefixes: Sequence[Prefix], device: torch.device) -> list[SharedPrefix]:
    """Group the rows of a batch by the prefix nodes they use; indices are on `device`."""
    rows_of: dict[PrefixMatch, list[int]] = {}
    for row, prefix in enumerate(prefixes):
        for match in prefix:
            rows_of.setdefault(match, []).append(row)
    shared = []
    for match, rows in rows_of.items():
        contiguous = rows[-1] - rows[0] == len(rows) - 1
        index = slice(rows[0], rows[-1] + 1) if contiguous else upload_columns([rows], device)[0]
        shared.append(SharedPrefix(index, match.data))
    return shared


class LRUCache:
    """Tensors by key within a budget of bytes; the least recently used are evicted first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = self.evictions = 0
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
        """Store `value`, evicting older ones; a value larger than the budget is not stored."""
        size = value.nbytes
        if key in self._items or size > self.budget:
            return
        while self.bytes + size > self.budget:
            self.bytes -= self._items.popitem(last=False)[1].nbytes
            self.evictions += 1
        self._items[key] = value
        self.bytes += size


@dataclass(frozen=True)
class CacheBounds:
    """Bytes of the KV cache (None: unlimited), prefix cache and feature cache, and prompt tokens per forward pass."""

    kv: int | None = None
    prefix: int = _STORE_BYTES
    features: int = _STORE_BYTES
    prefill_tokens: int = _PREFILL_TOKENS


def cache_bounds(
    spec: CacheSpec,
    kv: int | None = None,
    prefix: int | None = None,
    features: int | None = None,
    prefill_tokens: int | None = None,
) -> CacheBounds:
    """Complete the given bounds with defaults.

    On CUDA the defaults are fractions of the currently free memory; the KV cache holds at least one full context if
    that leaves room. A model split over GPUs is limited by the GPU with the least free memory per layer.
    """
    bounds = {"kv": kv, "prefix": prefix, "features": features, "prefill_tokens": prefill_tokens}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    free = spec.device.type == "cuda" and len(given) < len(bounds)
    return replace(_from_free_memory(spec) if free else CacheBounds(), **given)


def _from_free_memory(spec: CacheSpec) -> CacheBounds:
    layers = Counter(spec.layer_devices or (spec.device,) * spec.layers)
    room = min(free_memory(device) * spec.layers // count for device, count in layers.items())
    context = (spec.context_length or 0) * spec.bytes_per_token
    prefill = int(_PREFILL_SHARE * room) // spec.bytes_per_token  # its keys and values exist beside the KV cache
    kv = max(int(_KV_SHARE * room), min(context, int(_CONTEXT_SHARE * room)))
    prefix = max(_LEAST_PREFIX_SHARE, min(_PREFIX_SHARE, _CACHES_SHARE - _GROWTH * kv / room)) if room else 0.0
    return CacheBounds(
        kv=kv,
        prefix=int(prefix * room),
        features=min(4 * _STORE_BYTES, int(_FEATURE_SHARE * free_memory(spec.device))),
        prefill_tokens=max(_LEAST_PREFILL_TOKENS, min(_PREFILL_TOKENS, prefill)),
    )


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, including memory that PyTorch has reserved but not allocated."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def format_size(size: int) -> str:
    """Bytes as GiB, or as MiB below 1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
