"""Where the tokens of a batch lie: rows packed without padding for the products, side by side for attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.engine.attention import attend
from llava.engine.cache import CacheSpec, RowCache, shared_parts
from llava.engine.prefixes import Chain, tokens_of


class PackedRows:
    """Rows of `lengths` tokens behind `chains`, packed one after the other (N tokens) for a prefill.

    `data` (layers, 2, n, kv_heads, T, head_dim) receives their keys and values; T is the longest row, and what lies
    behind a shorter row's end repeats its last token: finite, and hidden from it by causality. `last` are the places of
    the rows' last tokens.
    """

    def __init__(self, spec: CacheSpec, lengths: Sequence[int], chains: Sequence[Chain]) -> None:
        device = spec.device
        count, longest = len(lengths), max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        self.even = min(lengths) == longest
        self.data = spec.empty(count, longest)
        behind = [tokens_of(chain) for chain in chains]
        self.positions = [first + at for first, length in zip(behind, lengths, strict=True) for at in range(length)]
        starts = self.lengths.cumsum(0) - self.lengths
        self.last = starts + self.lengths - 1  # (n,)
        steps = torch.arange(longest, device=device)
        self.gather = starts[:, None] + torch.minimum(steps, self.lengths[:, None] - 1)  # (n, T) places in the pack
        self.real = steps < self.lengths[:, None]  # (n, T)
        self.parts = shared_parts(chains, device)
        zero = torch.zeros((), dtype=spec.dtype, device=device)
        self.causal = zero.expand(longest, longest).masked_fill(steps > steps[:, None], -math.inf)  # (T, T)
        self.ends = None if self.even else zero.expand(count, longest).masked_fill(~self.real, -math.inf)[:, None, None]

    def attention(self, layer: int, query: Tensor, keys_values: Tensor, last: bool) -> Tensor:
        """Queries (N, heads, head_dim), or with `last` those of the last tokens (n, …), to their contexts (N, D).

        `keys_values` (N, 2, kv_heads, head_dim) are stored on the way.
        """
        count, longest = self.gather.shape
        rows = self._rows(keys_values).permute(2, 0, 3, 1, 4)  # (2, n, kv_heads, T, head_dim)
        self.data[layer] = rows
        keys, values = self.data[layer]
        kv_heads, size = keys.shape[1], keys.shape[3]
        if last:
            if not len(query):
                return query
            grouped = query.view(count, kv_heads, -1, size)
            if self.parts:
                out = attend(grouped, keys, values, self.ends, self.parts, layer)
            else:
                out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.ends)
            return out.reshape(count, -1)
        query = self._rows(query)  # (n, T, heads, head_dim)
        group = query.shape[2] // kv_heads
        if self.parts:
            grouped = query.view(count, longest, kv_heads, group, size).permute(0, 2, 3, 1, 4)
            grouped = grouped.reshape(count, kv_heads, group * longest, size)
            mask = self.causal.repeat(group, 1) if group > 1 else None
            out = attend(grouped, keys, values, mask, self.parts, layer, causal=group == 1)
            out = out.reshape(count, kv_heads * group, longest, size)
        else:
            keys, values = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (keys, values))
            out = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, is_causal=longest > 1)
        out = out.transpose(1, 2).reshape(count, longest, -1)  # (n, T, D)
        return out.view(count * longest, -1) if self.even else out[self.real]

    def _rows(self, packed: Tensor) -> Tensor:
        """(N, …) to (n, T, …)."""
        return packed.view(*self.gather.shape, *packed.shape[1:]) if self.even else packed[self.gather]


class DecodeStep:
    """One token a row, behind what the cache holds."""

    def __init__(self, cache: RowCache) -> None:
        cache.make_room()
        self.cache = cache
        self.parts = cache.shared()
        self.mask: Tensor | None = None
        mask = cache.mask()
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=cache.spec.dtype, device=mask.device).masked_fill(~mask, -math.inf)
            self.mask = hidden[:, None, None]  # (B, 1, 1, W)

    def attention(self, layer: int, query: Tensor, keys_values: Tensor, last: bool) -> Tensor:
        """Queries (B, heads, head_dim) and new `keys_values` (B, 2, kv_heads, head_dim) to contexts (B, D)."""
        cache, count = self.cache, len(query)
        rows = cache.data[layer, :, :count]  # (2, B, kv_heads, columns, head_dim)
        rows[:, :, :, cache.end] = keys_values.transpose(0, 1)
        keys, values = rows[..., cache.start : cache.end + 1, :]
        grouped = query.view(count, keys.shape[1], -1, keys.shape[3])
        if self.parts:
            out = attend(grouped, keys, values, self.mask, self.parts, layer)
        else:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask)
        return out.reshape(count, -1)
