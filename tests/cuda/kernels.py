"""CPU versions of the CUDA-only attention operators, with the input checks of the real kernels.

Each takes and returns plain CPU tensors. Inputs that the real kernel rejects raise here too, and values it leaves
undefined are NaN here, so that code passing on the simulated GPU does not rely on undefined values on a real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
LSE_ALIGNMENT = 32  # queries: the efficient kernel pads its log-sum-exp to a multiple of this
HALF = (torch.float16, torch.bfloat16)


def alignment(dtype: torch.dtype) -> int:
    """Elements per 16 bytes, the alignment required by vectorised loads of the attention bias."""
    return 16 // dtype.itemsize


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Requirements of both kernels on (B, H, M, D), (B, H, W, D) and (B, H, W, Dv)."""
    shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
    if any(part.dim() != 4 for part in (query, key, value)):
        raise RuntimeError(f"fused attention takes 4-D query, key and value, got {shapes}")
    if len({part.dtype for part in (query, key, value)}) > 1:
        raise RuntimeError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    same = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[:3] == value.shape[:3]
    if not same or query.shape[1] != key.shape[1] or query.shape[3] != key.shape[3]:
        raise RuntimeError(f"query, key and value do not fit together: {shapes}")
    if any(part.stride(3) != 1 and part.shape[3] > 1 for part in (query, key, value)):
        raise RuntimeError("the last dimension of query, key and value must be contiguous")
    if query.shape[2] == 0 or key.shape[2] == 0:
        raise RuntimeError(f"fused attention of no queries or no keys: {shapes}")


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, M, Dv), laid out as (B, M, H, Dv) like the kernels' output, and log-sum-exp (B, H, M) float32.

    Accumulated in float32, with the weights rounded to the dtype of `value` before the second product.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
    sums = scores.logsumexp(-1)
    weights = (scores - sums.unsqueeze(-1)).exp().to(value.dtype)
    out = (weights.float() @ value.float()).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), sums


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten._scaled_dot_product_flash_attention`: 16-bit only, no mask, head size a multiple of 8 up to 256."""
    check_inputs(query, key, value)
    size = query.shape[-1]
    if query.dtype not in HALF:
        raise RuntimeError(f"FlashAttention only supports fp16 and bf16 data types, got {query.dtype}")
    if size % 8 or size > 256 or value.shape[-1] != size:
        raise RuntimeError(f"FlashAttention takes heads of a multiple of 8 up to 256, got {size}")
    if is_causal and query.shape[2] != key.shape[2]:
        raise RuntimeError("FlashAttention aligns the causal mask at the last key; pass as many queries as keys")
    if dropout_p:
        raise RuntimeError("the simulated FlashAttention has no dropout")
    out, sums = attention(query, key, value, None, is_causal, scale)
    empty = torch.empty(0)
    state = torch.zeros(2, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int32)
    return out, sums, none, none.clone(), query.shape[2], key.shape[2], state, state[0].clone(), empty


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten._scaled_dot_product_efficient_attention`; the log-sum-exp after the last query is NaN."""
    check_inputs(query, key, value)
    for name, part in (("query", query), ("key", key), ("value", value)):
        check_strides(name, part, 4 if part.dtype in HALF else 1)
    if attn_bias is not None:
        check_bias(attn_bias, query, key)
    if dropout_p:
        raise RuntimeError("the simulated efficient attention has no dropout")
    out, sums = attention(query, key, value, attn_bias, is_causal, scale)
    batch, heads, queries = sums.shape
    padded = -(-queries // LSE_ALIGNMENT) * LSE_ALIGNMENT if compute_log_sumexp else 0
    log_sums = torch.full((batch, heads, padded), math.nan)
    log_sums[..., :queries] = sums[..., : min(queries, padded)]
    return out, log_sums, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def check_strides(name: str, tensor: Tensor, unit: int) -> None:
    """Strides of batches, heads and rows must be multiples of `unit` elements; dimensions of size 1 are ignored."""
    for dim, label in enumerate(("strideB", "strideH", "strideM")):
        if tensor.shape[dim] > 1 and tensor.stride(dim) % unit:
            raise RuntimeError(
                f"{name} is not correctly aligned ({label}): stride({dim}) is {tensor.stride(dim)}, and should be a "
                f"multiple of {unit}"
            )


def check_bias(bias: Tensor, query: Tensor, key: Tensor) -> None:
    """The bias must be (B, H, M, W), broadcast by strides of 0 only, of the query's dtype, and aligned to 16 bytes."""
    shape = (*query.shape[:3], key.shape[2])
    if bias.dtype != query.dtype:
        raise RuntimeError(f"invalid dtype for bias - should match query's dtype: {bias.dtype}, {query.dtype}")
    if tuple(bias.shape) != shape:
        raise RuntimeError(f"attn_bias is {tuple(bias.shape)}, and should be expanded to {shape}")
    if bias.stride(3) != 1 and bias.shape[3] > 1:
        raise RuntimeError("the last dimension of attn_bias must be contiguous")
    check_strides("attn_bias", bias, alignment(bias.dtype))
    if bias.storage_offset() % alignment(bias.dtype):
        raise RuntimeError("attn_bias is not correctly aligned: it does not start at a multiple of 16 bytes")


KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: flash,
    aten._scaled_dot_product_efficient_attention.default: efficient,
}


def check_capability(func: Any, capability: tuple[int, int], dtype: torch.dtype) -> None:
    """GPUs older than Ampere have no FlashAttention and no fused attention in bfloat16."""
    if capability < (8, 0) and (KERNELS[func] is flash or dtype == torch.bfloat16):
        raise RuntimeError(f"{func} in {dtype} needs an Ampere GPU or newer; this GPU is {capability}")
