"""Batch layouts: prompts packed without padding for a prefill, and one new token per row for a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from llava.engine.attention import SharedPrefix, aligned_mask, attend, attention
from llava.engine.cache import CacheSpec, KVCache, shared_prefixes
from llava.engine.native.attention import KVBlock, PromptAttention, TokenStore
from llava.engine.prefix_cache import Prefix, num_tokens
from llava.engine.sampling import Sampler
from llava.model.transfer import Numbers, upload_columns

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines (N, 1, head_dim) of the tokens' positions


@dataclass
class _Layout:
    """Indices of a `VarlenBatch` on the device of a layer.

    `pad_index` (n * max_seqlen,) maps padded to packed tokens, `unpad_index` (N,) packed to padded ones; both are None
    if all rows have one length.
    """

    seqlens: Tensor
    pad_index: Tensor | None
    unpad_index: Tensor | None
    prefixes: list[SharedPrefix]
    masks: dict[str, Tensor] = field(default_factory=dict)


def rotate(qkv: Tensor, kv_heads: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Queries (N, heads, head_dim), and keys and values (N, 2, kv_heads, head_dim), of `qkv`, rotated in place
    (Su et al., "RoFormer", 2021)."""
    (cos, sin), size, heads = rotation, qkv.shape[-1], qkv.shape[1] - 2 * kv_heads
    query_key = qkv[:, : heads + kv_heads]
    swapped = query_key.roll(size // 2, -1)
    query_key.mul_(cos).addcmul_(swapped, sin)
    return qkv[:, :heads], qkv[:, heads:].view(len(qkv), 2, kv_heads, size)


class VarlenBatch:
    """Prompts of `seqlens` tokens behind `prefixes`, packed into N tokens for a prefill.

    `data` (layers, 2, n, kv_heads, max_seqlen, head_dim) receives their keys and values; the slots behind a shorter
    row hold finite values, which causality hides. `positions` (N,) are the tokens' positions, `last` (n,) the packed
    indices of the last tokens, `end` the largest position + 1. All indices are computed on the host and uploaded once.
    """

    def __init__(self, spec: CacheSpec, seqlens: Sequence[int], prefixes: Sequence[Prefix]) -> None:
        self.seqlens, self.prefixes, self.spec = list(seqlens), prefixes, spec
        self.max_seqlen = max(seqlens)
        self.even = min(seqlens) == self.max_seqlen
        self.data = spec.empty(len(seqlens), self.max_seqlen)
        offsets = [num_tokens(prefix) for prefix in prefixes]
        self.end = max(offset + length for offset, length in zip(offsets, seqlens, strict=True))
        cu_seqlens = torch.tensor(list(accumulate(seqlens, initial=0)))
        steps, lengths = torch.arange(self.max_seqlen), torch.tensor(self.seqlens)
        columns: list[Numbers] = [
            torch.cat([steps[:length] + offset for offset, length in zip(offsets, seqlens, strict=True)]),
            cu_seqlens[1:] - 1,
            lengths,
        ]
        if not self.even:
            columns.append((cu_seqlens[:-1, None] + torch.minimum(steps, lengths[:, None] - 1)).flatten())
            columns.append(torch.cat([steps[:length] + row * self.max_seqlen for row, length in enumerate(seqlens)]))
        self.positions, self.last, *self._uploaded = upload_columns(columns, spec.device)
        self._layouts: dict[torch.device, _Layout] = {}
        self._native: PromptAttention | None = None
        if PromptAttention.supports(spec.dtype, spec.device, spec.head_dim):
            blocks = [[KVBlock.of(match.node.data, match.num_tokens) for match in prefix] for prefix in prefixes]
            for row, length in enumerate(self.seqlens):
                blocks[row].append(KVBlock.of(self.data[:, :, row], length))
            self._native = PromptAttention(self.seqlens, blocks)
        self._store = TokenStore.build(self.data, self.seqlens)

    def store(self, layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
        """Rotated queries (N, heads, head_dim) of `qkv` (N, heads + 2 * kv_heads, head_dim), which may be overwritten.

        Stores rotated keys, and values, in `data`.
        """
        if self._store is not None:
            return self._store(layer, qkv, rotation)
        kv_heads = self.spec.kv_heads
        query, keys_values = rotate(qkv, kv_heads, rotation)
        padded = self._pad(keys_values, self._layout(qkv.device)).permute(2, 0, 3, 1, 4)
        self.data[layer].copy_(padded)  # (2, n, kv_heads, max_seqlen, head_dim)
        return query

    def attend(self, layer: int, query: Tensor, last: bool) -> Tensor:
        """Attention of queries (N, heads, head_dim), or with `last` of the last tokens' (n, …): contexts (N, D)."""
        layout = self._layout(query.device)
        count, max_seqlen = len(self.seqlens), self.max_seqlen
        keys, values = self.data[layer, 0], self.data[layer, 1]
        kv_heads, size = keys.shape[1], keys.shape[3]
        if last:
            grouped = query.view(count, kv_heads, -1, size)
            mask = None if self.even else self._mask("padding", layout)
            return attend(grouped, keys, values, mask, layout.prefixes, layer).reshape(count, -1)
        if self._native is not None:
            return self._native(query, kv_heads, size, layer=layer, causal=True)
        query = self._pad(query, layout)  # (n, max_seqlen, heads, head_dim)
        group = query.shape[2] // kv_heads
        if layout.prefixes:
            grouped = query.view(count, max_seqlen, kv_heads, group, size).permute(0, 2, 3, 1, 4)
            grouped = grouped.reshape(count, kv_heads, group * max_seqlen, size)
            mask = self._mask("causal", layout, group) if group > 1 else None
            out = attend(grouped, keys, values, mask, layout.prefixes, layer, causal=group == 1)
            out = out.reshape(count, kv_heads * group, max_seqlen, size)
        else:
            keys, values = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (keys, values))
            out = attention(query.transpose(1, 2), keys, values, causal=max_seqlen > 1)
        out = out.transpose(1, 2).reshape(count * max_seqlen, -1)  # (n * max_seqlen, D)
        return out if layout.unpad_index is None else out.index_select(0, layout.unpad_index)

    def _pad(self, packed: Tensor, layout: _Layout) -> Tensor:
        """(N, …) to (n, max_seqlen, …)."""
        padded = packed if layout.pad_index is None else packed.index_select(0, layout.pad_index)
        return padded.view(len(self.seqlens), self.max_seqlen, *packed.shape[1:])

    def _layout(self, device: torch.device) -> _Layout:
        if device not in self._layouts:
            seqlens, *padding = (one.to(device, non_blocking=True) for one in self._uploaded)
            pad_index, unpad_index = padding or (None, None)
            self._layouts[device] = _Layout(seqlens, pad_index, unpad_index, shared_prefixes(self.prefixes, device))
        return self._layouts[device]

    def _mask(self, kind: str, layout: _Layout, group: int = 1) -> Tensor:
        """The "padding" mask (n, 1, 1, max_seqlen), or the "causal" mask (group * max_seqlen, max_seqlen)."""
        if kind not in layout.masks:
            seqlens, width = layout.seqlens, self.max_seqlen
            if kind == "padding":
                last = seqlens[:, None, None, None] - 1
            else:
                last = torch.arange(width, device=seqlens.device).repeat(group)[:, None]
            layout.masks[kind] = aligned_mask(lambda slots: slots <= last, width, self.spec.dtype, seqlens.device)
        return layout.masks[kind]


class DecodeStep:
    """One new token per row behind the tokens in the cache.

    `ids` and `positions` (B,) are on the device of the embeddings. The parameters of `sampler` share their
    host-to-device copy, so a step has one.
    """

    def __init__(self, ids: Sequence[int], cache: KVCache, sampler: Sampler | None = None) -> None:
        cache.make_room()
        self.cache = cache
        self.width = cache.end - cache.start + 1
        self.end = max(cache.positions()) + 1
        hidden = [self.width - 1 - length for length in cache.lengths]  # token slots left of each row
        columns: list[Numbers] = [ids, cache.positions(), *([hidden] if any(hidden) else [])]
        device = cache.spec.device
        sampled = sampler.host_params() if sampler is not None and device.type == "cuda" else []
        uploaded = upload_columns([*columns, *sampled], device)
        self.ids, self.positions, *padding = uploaded[: len(columns)]
        if sampler is not None and sampled:
            sampler.set_device_params(uploaded[len(columns) :])
        self._hidden = padding[0] if padding else None
        self._masks: dict[torch.device, Tensor | None] = {}

    def store(self, layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
        """As `VarlenBatch.store`, of the new tokens in the cache."""
        query, keys_values = rotate(qkv, self.cache.spec.kv_heads, rotation)
        self.cache.data[layer][:, : len(qkv), :, self.cache.end] = keys_values.transpose(0, 1)
        return query

    def attend(self, layer: int, query: Tensor, last: bool) -> Tensor:
        """Attention of queries (B, heads, head_dim): contexts (B, D)."""
        cache, count = self.cache, len(query)
        keys, values = cache.data[layer, :, :count, :, cache.start : cache.end + 1]  # (B, kv_heads, W, head_dim)
        grouped = query.view(count, keys.shape[1], -1, keys.shape[3])
        mask, prefixes = self._mask(query.device), cache.shared(query.device)
        return attend(grouped, keys, values, mask, prefixes, layer).reshape(count, -1)

    def visible(self) -> Tensor | None:
        """Boolean mask (B, W) of the token slots of each row, its new one included; None if no row is padded."""
        if self._hidden is None:
            return None
        return torch.arange(self.width, device=self._hidden.device) >= self._hidden[:, None]

    def _mask(self, device: torch.device) -> Tensor | None:
        """`visible` as an additive mask (B, 1, 1, W) on `device`."""
        if device not in self._masks:
            mask = None
            if self._hidden is not None:
                hidden = self._hidden.to(device, non_blocking=True)[:, None, None, None]
                mask = aligned_mask(lambda slots: slots >= hidden, self.width, self.cache.spec.dtype, device)
            self._masks[device] = mask
        return self._masks[device]
