"""Where the tokens of a batch lie: rows packed without padding for the products, side by side for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.engine.attention import Shared, aligned_mask, attend, attention
from llava.engine.cache import CacheSpec, KVCache, shared_parts
from llava.engine.prefix_cache import Chain, tokens_of
from llava.engine.sampling import Sampler
from llava.model.transfer import Numbers, upload_columns


@dataclass
class _OnDevice:
    """What attention needs on the device of a layer.

    `gather` (n * T,) indexes the packed tokens, `real` (N,) the padded ones; both are None without padding.
    """

    lengths: Tensor
    gather: Tensor | None
    real: Tensor | None
    parts: list[Shared]
    masks: dict[str, Tensor] = field(default_factory=dict)


class VarlenBatch:
    """Rows of `lengths` tokens behind `chains`, packed one after the other (N tokens) for a prefill.

    `data` (layers, 2, n, kv_heads, T, head_dim) receives their keys and values; T is the longest row, and what lies
    follows the end of a shorter row repeats its last token: finite, and hidden from it by causality. `positions` (N,)
    are those of the tokens, `last` (n,) the packed indices of the rows' last tokens, `end` the largest position + 1.
    All indices are computed on the host and uploaded once.
    """

    def __init__(self, spec: CacheSpec, lengths: Sequence[int], chains: Sequence[Chain]) -> None:
        self.lengths, self.chains, self.spec = list(lengths), chains, spec
        self.longest = max(lengths)
        self.even = min(lengths) == self.longest
        self.data = spec.empty(len(lengths), self.longest)
        behind = [tokens_of(chain) for chain in chains]
        self.end = max(first + length for first, length in zip(behind, lengths, strict=True))
        starts, total = [], 0
        for length in lengths:
            starts.append(total)
            total += length
        steps = torch.arange(self.longest)
        ends = torch.tensor(self.lengths)
        columns: list[Numbers] = [
            torch.cat([steps[:length] + first for first, length in zip(behind, lengths, strict=True)]),
            torch.tensor(starts) + ends - 1,
            ends,
        ]
        if not self.even:
            columns.append((torch.tensor(starts)[:, None] + torch.minimum(steps, ends[:, None] - 1)).flatten())
            columns.append(torch.cat([steps[:length] + row * self.longest for row, length in enumerate(lengths)]))
        self.positions, self.last, *self._uploaded = upload_columns(columns, spec.device)
        self._places: dict[torch.device, _OnDevice] = {}

    def attention(self, layer: int, query: Tensor, keys_values: Tensor, last: bool) -> Tensor:
        """Queries (N, heads, head_dim), or with `last` those of the last tokens (n, …), to their contexts (N, D).

        `keys_values` (N, 2, kv_heads, head_dim) are stored on the way.
        """
        places = self._on(query.device)
        count, longest = len(self.lengths), self.longest
        rows = self._rows(keys_values, places).permute(2, 0, 3, 1, 4)  # (2, n, kv_heads, T, head_dim)
        stored = self.data[layer].copy_(rows)
        keys, values = stored[0], stored[1]
        kv_heads, size = keys.shape[1], keys.shape[3]
        if last:
            if not len(query):
                return query
            grouped = query.view(count, kv_heads, -1, size)
            mask = None if self.even else self._mask("ends", places)
            return attend(grouped, keys, values, mask, places.parts, layer).reshape(count, -1)
        query = self._rows(query, places)  # (n, T, heads, head_dim)
        group = query.shape[2] // kv_heads
        if places.parts:
            grouped = query.view(count, longest, kv_heads, group, size).permute(0, 2, 3, 1, 4)
            grouped = grouped.reshape(count, kv_heads, group * longest, size)
            mask = self._mask("causal", places, group) if group > 1 else None
            out = attend(grouped, keys, values, mask, places.parts, layer, causal=group == 1)
            out = out.reshape(count, kv_heads * group, longest, size)
        else:
            keys, values = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (keys, values))
            out = attention(query.transpose(1, 2), keys, values, causal=longest > 1)
        out = out.transpose(1, 2).reshape(count * longest, -1)  # (n * T, D)
        return out if places.real is None else out.index_select(0, places.real)

    def _rows(self, packed: Tensor, places: _OnDevice) -> Tensor:
        """(N, …) to (n, T, …)."""
        padded = packed if places.gather is None else packed.index_select(0, places.gather)
        return padded.view(len(self.lengths), self.longest, *packed.shape[1:])

    def _on(self, device: torch.device) -> _OnDevice:
        if device not in self._places:
            lengths, *padding = (one.to(device, non_blocking=True) for one in self._uploaded)
            gather, real = padding or (None, None)
            self._places[device] = _OnDevice(lengths, gather, real, shared_parts(self.chains, device))
        return self._places[device]

    def _mask(self, kind: str, places: _OnDevice, group: int = 1) -> Tensor:
        """The mask of one `kind`: "ends" hides what follows each row's end, (n, 1, 1, T); "causal" what follows each of
        the `group` * T queries, (group * T, T)."""
        if kind not in places.masks:
            lengths, longest = places.lengths, self.longest
            if kind == "ends":
                last = lengths[:, None, None, None] - 1
            else:
                last = torch.arange(longest, device=lengths.device).repeat(group)[:, None]
            places.masks[kind] = aligned_mask(lambda columns: columns <= last, longest, self.spec.dtype, lengths.device)
        return places.masks[kind]


class DecodeStep:
    """One new token per row, after the tokens in the cache.

    `ids` and `positions` (B,) are on the device of the embeddings. The parameters of `sampler` share their
    host-to-device copy: there is one per step.
    """

    def __init__(self, ids: Sequence[int], cache: KVCache, sampler: Sampler | None = None) -> None:
        cache.make_room()
        self.cache = cache
        self.width = cache.end - cache.start + 1
        self.end = max(cache.positions()) + 1
        hidden = [self.width - 1 - length for length in cache.lengths]  # columns of other rows, on the left
        columns: list[Numbers] = [ids, cache.positions(), *([hidden] if any(hidden) else [])]
        device = cache.spec.device
        sampled = sampler.columns() if sampler is not None and device.type == "cuda" else []
        uploaded = upload_columns([*columns, *sampled], device)
        self.ids, self.positions, *padding = uploaded[: len(columns)]
        if sampler is not None and sampled:
            sampler.receive(uploaded[len(columns) :])
        self._hidden = padding[0] if padding else None
        self._masks: dict[torch.device, Tensor | None] = {}

    def attention(self, layer: int, query: Tensor, keys_values: Tensor, last: bool) -> Tensor:
        """Queries (B, heads, head_dim) and new `keys_values` (B, 2, kv_heads, head_dim) to contexts (B, D)."""
        cache, count = self.cache, len(query)
        rows = cache.data[layer, :, :count]  # (2, B, kv_heads, columns, head_dim)
        rows[:, :, :, cache.end] = keys_values.transpose(0, 1)
        keys, values = rows[..., cache.start : cache.end + 1, :]
        grouped = query.view(count, keys.shape[1], -1, keys.shape[3])
        mask, parts = self._mask(query.device), cache.shared(query.device)
        return attend(grouped, keys, values, mask, parts, layer).reshape(count, -1)

    def visible(self) -> Tensor | None:
        """(B, W) bool: the columns each row sees, its new one included; None where no row is padded."""
        if self._hidden is None:
            return None
        return torch.arange(self.width, device=self._hidden.device) >= self._hidden[:, None]

    def _mask(self, device: torch.device) -> Tensor | None:
        """`visible` as attention adds it, (B, 1, 1, W), on `device`."""
        if device not in self._masks:
            mask = None
            if self._hidden is not None:
                hidden = self._hidden.to(device, non_blocking=True)[:, None, None, None]
                mask = aligned_mask(lambda columns: columns >= hidden, self.width, self.cache.spec.dtype, device)
            self._masks[device] = mask
        return self._masks[device]
