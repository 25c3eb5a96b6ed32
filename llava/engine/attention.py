"""Attention over shared prefixes: their keys and values are read once for all rows of a batch and never copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.placement import is_ampere

_SCORES = 2**27  # scores materialised at a time by the fallback: 512 MiB in float32
ALIGNMENT: Final = 16  # elements; fused kernels require the rows of a mask to start at multiples of it

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]
Operator = Callable[..., tuple[Tensor, ...]]


def _operator(name: str, *arguments: str) -> Operator | None:
    """A private operator of torch, or None if it does not exist or its schema has other arguments."""
    operator: Operator | None = getattr(torch.ops.aten, name, None)
    schema = str(getattr(getattr(operator, "default", None), "_schema", ""))
    return operator if all(argument in schema for argument in arguments) else None


_cpu_flash = _operator("_scaled_dot_product_flash_attention_for_cpu", "attn_mask", "Tensor logsumexp")
_cuda_flash = _operator("_scaled_dot_product_flash_attention", "bool is_causal", "Tensor logsumexp")
_cuda_efficient = _operator(
    "_scaled_dot_product_efficient_attention", "Tensor? attn_bias, bool compute_log_sumexp", "Tensor log_sumexp"
)


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values `data` (layers, 2, kv_heads, P, head_dim) in front of those of `rows`, a slice or indices."""

    rows: slice | Tensor
    data: Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    prefixes: Sequence[SharedPrefix],
    layer: int,
    *,
    causal: bool = False,
) -> Tensor:
    """Softmax attention (n, kv_heads, M, head_dim) of every row over its shared prefixes and its own keys.

    `query` is (n, kv_heads, M, head_dim): the M queries of a row and key head (tokens times heads per group). `keys`
    and `values` are the rows' own (n, kv_heads, W, head_dim); `mask` is added to their scores and broadcasts to
    (n, 1, M, W). `causal` requires that queries and own keys are the same tokens. Attention is computed per part and
    merged by log-sum-exp (Dao et al., "FlashAttention", 2022), so each part is read once for all rows and no scores
    are materialised.
    """
    if not prefixes:
        return attention(query, keys, values, mask, causal=causal)
    out, lse = attention_with_lse(query, keys, values, mask, causal=causal)
    for prefix in prefixes:
        packed = _pack(query[prefix.rows]).unsqueeze(0)  # (1, h, m * M, D)
        packed_out, packed_lse = attention_with_lse(packed, *prefix.data[layer].unsqueeze(1))
        prefix_out, prefix_lse = (_unpack(part[0], query.shape[2]) for part in (packed_out, packed_lse.unsqueeze(-1)))
        own_out, own_lse = out[prefix.rows], lse[prefix.rows].unsqueeze(-1)  # (m, h, M, D), (m, h, M, 1)
        own_out.lerp_(prefix_out, torch.sigmoid(prefix_lse - own_lse).to(out.dtype))
        torch.logaddexp(own_lse, prefix_lse, out=own_lse)
        if isinstance(prefix.rows, Tensor):  # indexing made copies
            out[prefix.rows], lse[prefix.rows] = own_out, own_lse.squeeze(-1)
    return out


def attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Attention (n, h, M, D) of (n, h, M, D) over (n, h, W, D); on CUDA by the kernel of `select_kernel`.

    `scaled_dot_product_attention` selects by the current device, not the tensors', and on Hopper prefers cuDNN, which
    builds an execution plan for every new shape: in decoding, at every step.
    """
    if query.is_cuda:
        kernel, _ = select_kernel(query.device, query.dtype, query.shape[-1], masked=mask is not None)
        if kernel is not attention_from_scores:
            return kernel(query, keys, values, mask, causal)[0]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)


def attention_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention (n, h, M, D) of (n, h, M, D) over (n, h, W, D), and the log-sum-exp (n, h, M) of its scores."""
    kernel, _ = select_kernel(query.device, query.dtype, query.shape[-1], masked=mask is not None)
    return kernel(query, keys, values, mask, causal)


def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, *, masked: bool) -> tuple[Kernel, str]:
    """Select the kernel of `attention_with_lse` for such tensors; return it and its name.

    FlashAttention requires 16-bit tensors, an Ampere GPU or newer, and no mask; the memory-efficient kernel supports
    masks and float32. Other cases (MPS, ROCm, unusual head sizes) materialise the scores.
    """
    if device.type == "cpu" and _cpu_flash is not None:
        return _flash_on_cpu, "flash (CPU)"
    if device.type == "cuda" and torch.version.hip is None and head_dim % 8 == 0 and head_dim <= 256:
        half = dtype in (torch.float16, torch.bfloat16)
        ampere = is_ampere(device)
        if _cuda_flash is not None and half and ampere and not masked:
            return _flash_on_cuda, "flash"
        if _cuda_efficient is not None and (ampere or dtype is not torch.bfloat16):
            return _efficient_on_cuda, "memory-efficient"
    return attention_from_scores, "materialised scores"


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    assert _cpu_flash is not None
    out, lse = _cpu_flash(q, k, v, is_causal=causal, attn_mask=mask)
    return out, lse


def _flash_on_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    assert _cuda_flash is not None
    out, lse, *_ = _cuda_flash(q, k, v, is_causal=causal)
    return out, lse


def _efficient_on_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """`mask` must come from `aligned_mask`: the kernel reads its rows in vectors and does not pad."""
    assert _cuda_efficient is not None
    bias = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    out, lse, *_ = _cuda_efficient(q, k, v, bias, True, is_causal=causal)
    return out, lse[..., : q.shape[2]]  # the kernel rounds the number of queries up


def attention_from_scores(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` on any device; it materialises the scores of as many heads at a time as fit."""
    count, heads, queries, size = query.shape
    width = keys.shape[2]
    if causal:
        mask = query.new_full((queries, width), -math.inf).triu(1)
    out, lse = torch.empty_like(query), query.new_empty(count, heads, queries, dtype=torch.float32)
    step = max(1, _SCORES // (count * queries * width))
    for first in range(0, heads, step):
        some = slice(first, first + step)
        scores = (query[:, some] / math.sqrt(size)) @ keys[:, some].transpose(-1, -2)
        scores = (scores if mask is None else scores + mask).float()
        lse[:, some] = scores.logsumexp(-1)
        out[:, some] = (scores - lse[:, some, :, None]).exp().to(query.dtype) @ values[:, some]
    return out, lse


def aligned_mask(visible: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive attention mask (…, W): 0 where `visible`, called with token slots (W',), is true, -inf elsewhere.

    The stride of its rows is a multiple of `ALIGNMENT` elements, as fused kernels require; torch would otherwise copy
    the mask into such a layout in every layer.
    """
    seen = visible(torch.arange(-(-width // ALIGNMENT) * ALIGNMENT, device=device))
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
    return mask[..., :width]


def _pack(rows: Tensor) -> Tensor:
    """(m, h, M, X) to (h, m * M, X): the queries of all rows as one matrix per head."""
    count, heads, queries, width = rows.shape
    return rows.transpose(0, 1).reshape(heads, count * queries, width)


def _unpack(block: Tensor, queries: int) -> Tensor:
    """The inverse of `_pack`."""
    heads, _, width = block.shape
    return block.view(heads, -1, queries, width).transpose(0, 1)
