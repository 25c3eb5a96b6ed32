"""Attention of rows that have a beginning in common: its keys and values are read once for all, never copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES = 2**27  # held at a time, where they are held: 512 MiB


def _cpu_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What the public function runs on a CPU, which gives the sums too; private, so it may be missing or other."""
    found = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return found if found is not None and "attn_mask" in str(found.default._schema) else None


_flash = _cpu_kernel()


@dataclass(frozen=True)
class Shared:
    """Keys and values (layers, 2, kv_heads, P, head_dim) that `rows` of the batch, a slice or indices, have before
    their own."""

    rows: slice | Tensor
    data: Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    shared: Sequence[Shared],
    layer: int,
    *,
    causal: bool = False,
) -> Tensor:
    """Softmax attention of every row over its shared parts and its own keys, (n, kv_heads, M, head_dim).

    `query` is (n, kv_heads, M, head_dim): the M queries of a row and key head (tokens times heads in a group). `keys`
    and `values` are the rows' own (n, kv_heads, W, head_dim), `mask` is added to their scores and broadcasts to
    (n, 1, M, W); `causal` says that queries and own keys are the same tokens, each of which sees those up to itself.
    Every part is attended to by itself, and the results are weighed by the sums that their softmax divided by (Dao et
    al., "FlashAttention", 2022), so a part is read once for all rows, and no scores are kept.
    """
    out, sums = attention_and_sums(query, keys, values, mask, causal=causal)
    for part in shared:
        asked = _pack(query[part.rows]).unsqueeze(0)  # (1, h, m * M, D)
        found, theirs = attention_and_sums(asked, *part.data[layer].unsqueeze(1))
        found, theirs = _unpack(found[0], query.shape[2]), _unpack(theirs[0, ..., None], query.shape[2])
        ours = sums[part.rows].unsqueeze(-1)  # (m, h, M, 1)
        out[part.rows] = torch.lerp(out[part.rows], found, torch.sigmoid(theirs - ours).to(out.dtype))
        sums[part.rows] = torch.logaddexp(ours, theirs).squeeze(-1)
    return out


def attention_and_sums(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention (n, h, M, D) of (n, h, M, D) over (n, h, W, D), and the logarithms (n, h, M) of the softmax's sums."""
    if query.device.type == "cpu" and _flash is not None:
        found, sums = _flash(query, keys, values, is_causal=causal, attn_mask=mask)
        return found, sums
    return attention_and_sums_by_scores(query, keys, values, mask, causal=causal)


def attention_and_sums_by_scores(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The same on every device, with scores made for as many heads at a time as fit."""
    count, heads, queries, size = query.shape
    width = keys.shape[2]
    if causal:
        mask = query.new_full((queries, width), -math.inf).triu(1)
    out, sums = torch.empty_like(query), query.new_empty(count, heads, queries, dtype=torch.float32)
    step = max(1, _SCORES // (count * queries * width))
    for first in range(0, heads, step):
        some = slice(first, first + step)
        scores = (query[:, some] / math.sqrt(size)) @ keys[:, some].transpose(-1, -2)
        scores = (scores if mask is None else scores + mask).float()
        sums[:, some] = scores.logsumexp(-1)
        out[:, some] = (scores - sums[:, some, :, None]).exp().to(query.dtype) @ values[:, some]
    return out, sums


def _pack(rows: Tensor) -> Tensor:
    """(m, h, M, X) to (h, m * M, X): all rows' queries as one matrix a head."""
    count, heads, queries, width = rows.shape
    return rows.transpose(0, 1).reshape(heads, count * queries, width)


def _unpack(block: Tensor, queries: int) -> Tensor:
    """The inverse of `_pack`."""
    heads, _, width = block.shape
    return block.view(heads, -1, queries, width).transpose(0, 1)
