"""Attention of rows that have a beginning in common: its keys and values are read once for all, never copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES = {"cpu": 2**19, "cuda": 2**27}  # scores held at a time: what the CPU's second cache holds, or 512 MiB on a GPU


@dataclass(frozen=True)
class Shared:
    """Keys and values (layers, 2, kv_heads, P, head_dim) that `rows` of the batch have at their columns from `at` on.

    `rows` is a slice or an index tensor; P columns are used, however many more `data` may hold.
    """

    rows: slice | Tensor
    data: Tensor
    at: int

    @property
    def end(self) -> int:
        return self.at + int(self.data.shape[-2])


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    shared: Sequence[Shared],
    layer: int,
    *,
    full: bool,
) -> Tensor:
    """Softmax attention of every row over its shared parts and then over its own keys, (n, kv_heads, M, head_dim).

    `query` is (n, kv_heads, M, head_dim): the M queries of a row and key head (tokens times heads in a group). `keys`
    and `values` are the rows' own (n, kv_heads, W, head_dim), `mask` is added to their scores and broadcasts to
    (n, 1, M, W). `full` says that the shared parts of every row fill all columns before its own. The softmax runs in
    float32; scores are made for as many heads at a time as stay in the cache of the processor.
    """
    count, kv_heads, queries, _ = query.shape
    before = max(part.end for part in shared)
    width = before + keys.shape[-2]
    step = max(1, _SCORES.get(query.device.type, 2**24) // (count * queries * width))
    query = query * (1 / math.sqrt(query.shape[-1]))
    out = torch.empty_like(query)
    for first in range(0, kv_heads, step):
        heads = slice(first, first + step)
        asked = query[:, heads]  # (n, h, M, D)
        scores = asked.new_empty(count, asked.shape[1], queries, width)
        if not full:
            scores[..., :before] = -math.inf
        own = asked @ keys[:, heads].transpose(-1, -2)
        scores[..., before:] = own if mask is None else own + mask
        for part in shared:
            block = _pack(asked[part.rows]) @ part.data[layer, 0, heads].transpose(-1, -2)  # (h, m * M, P)
            scores[part.rows, :, :, part.at : part.end] = _unpack(block, queries)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        found = weights[..., before:] @ values[:, heads]
        for part in shared:
            block = _pack(weights[part.rows, :, :, part.at : part.end]) @ part.data[layer, 1, heads]
            found[part.rows] += _unpack(block, queries)
        out[:, heads] = found
    return out


def _pack(rows: Tensor) -> Tensor:
    """(m, h, M, X) to (h, m * M, X): all rows' queries as one matrix a head."""
    count, heads, queries, width = rows.shape
    return rows.transpose(0, 1).reshape(heads, count * queries, width)


def _unpack(block: Tensor, queries: int) -> Tensor:
    """The inverse of `_pack`."""
    heads, _, width = block.shape
    return block.view(heads, -1, queries, width).transpose(0, 1)
