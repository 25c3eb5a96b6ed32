"""Attention of rows that share a prefix: its keys and values are read once for all of them and never copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.placement import is_ampere

_SCORES = 2**27  # scores held at a time by the fallback: 512 MiB in float32
ALIGNMENT: Final = 16  # elements: fused kernels require the rows of a mask to start at multiples of it

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]


def _operator(name: str, *arguments: str) -> Any:
    """A private operator of torch, or None where it is missing or has other arguments: its schema may change."""
    found = getattr(torch.ops.aten, name, None)
    known = found is not None and all(argument in str(found.default._schema) for argument in arguments)
    return found if known else None


_cpu_flash = _operator("_scaled_dot_product_flash_attention_for_cpu", "attn_mask", "Tensor logsumexp")
_cuda_flash = _operator("_scaled_dot_product_flash_attention", "bool is_causal", "Tensor logsumexp")
_cuda_efficient = _operator(
    "_scaled_dot_product_efficient_attention", "Tensor? attn_bias, bool compute_log_sumexp", "Tensor log_sumexp"
)


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
    """Softmax attention of every row over its shared prefixes and its own keys, (n, kv_heads, M, head_dim).

    `query` is (n, kv_heads, M, head_dim): the M queries of a row and key head (tokens times heads in a group). `keys`
    and `values` are the rows' own (n, kv_heads, W, head_dim), `mask` is added to their scores and broadcasts to
    (n, 1, M, W); `causal` says that queries and own keys are the same tokens, each of which sees those up to itself.
    Attention is computed per part and merged by log-sum-exp (Dao et al., "FlashAttention", 2022), so each part is read
    once for all rows and no scores are materialised.
    """
    if not shared:
        return attention(query, keys, values, mask, causal=causal)
    out, lse = attention_with_lse(query, keys, values, mask, causal=causal)
    for part in shared:
        packed = _pack(query[part.rows]).unsqueeze(0)  # (1, h, m * M, D)
        found, theirs = attention_with_lse(packed, *part.data[layer].unsqueeze(1))
        found, theirs = _unpack(found[0], query.shape[2]), _unpack(theirs[0, ..., None], query.shape[2])
        mine, ours = out[part.rows], lse[part.rows].unsqueeze(-1)  # (m, h, M, D), (m, h, M, 1)
        mine.lerp_(found, torch.sigmoid(theirs - ours).to(out.dtype))
        torch.logaddexp(ours, theirs, out=ours)
        if isinstance(part.rows, Tensor):  # these were copies
            out[part.rows], lse[part.rows] = mine, ours.squeeze(-1)
    return out


def attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Attention (n, h, M, D) of (n, h, M, D) over (n, h, W, D), by the fused kernel of `select_kernel` on CUDA.

    PyTorch's own choice goes by the current device, not the tensors', and on Hopper falls on cuDNN, which builds an
    execution plan for every new shape: in decoding, at every step.
    """
    if query.is_cuda:
        kernel, _ = select_kernel(query.device, query.dtype, query.shape[-1], masked=mask is not None)
        if kernel is not attention_from_scores:
            return kernel(query, keys, values, mask, causal)[0]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)


def attention_with_lse(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention (n, h, M, D) of (n, h, M, D) over (n, h, W, D), and the log-sum-exp (n, h, M) of its scores.

    Fused kernels compute it where they can, on the CPU and on CUDA (`select_kernel`).
    """
    kernel, _ = select_kernel(query.device, query.dtype, query.shape[-1], masked=mask is not None)
    return kernel(query, keys, values, mask, causal)


def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, *, masked: bool) -> tuple[Kernel, str]:
    """The kernel that computes `attention_with_lse` for such tensors, and its name.

    FlashAttention takes no mask, and needs 16-bit tensors and an Ampere GPU or newer; the memory-efficient kernel
    supports masks and float32. Anything else (MPS, ROCm, unusual head sizes) materialises its scores.
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


def _flash_on_cpu(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _cpu_flash(query, keys, values, is_causal=causal, attn_mask=mask)
    return out, lse


def _flash_on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _cuda_flash(query, keys, values, is_causal=causal)
    return out, lse


def _efficient_on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """`mask` comes from `aligned_mask`: the kernel reads its rows in vectors and does not pad."""
    count, heads, queries, _ = query.shape
    bias = None if mask is None else mask.expand(count, heads, queries, keys.shape[2])
    out, lse, *_ = _cuda_efficient(query, keys, values, bias, True, is_causal=causal)
    return out, lse[..., :queries]  # the kernel rounds the number of queries up


def attention_from_scores(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` on every device, materialising the scores of as many heads at a time as fit."""
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
    """0 where `visible`, called with the columns (W',), is true and -inf elsewhere, (…, W).

    The stride of its rows is a multiple of `ALIGNMENT` elements, as fused kernels require: otherwise torch copies the
    mask into such a layout in every layer.
    """
    columns = torch.arange(-(-width // ALIGNMENT) * ALIGNMENT, device=device)
    seen = visible(columns)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
    return mask[..., :width]


def _pack(rows: Tensor) -> Tensor:
    """(m, h, M, X) to (h, m * M, X): all rows' queries as one matrix a head."""
    count, heads, queries, width = rows.shape
    return rows.transpose(0, 1).reshape(heads, count * queries, width)


def _unpack(block: Tensor, queries: int) -> Tensor:
    """The inverse of `_pack`."""
    heads, _, width = block.shape
    return block.view(heads, -1, queries, width).transpose(0, 1)
