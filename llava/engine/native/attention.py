"""Prompts in the C++ kernel: rotary embeddings, keys and values, and, on the tiles of Intel AMX, attention."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.engine.native.build import function, has_tiles, library
from llava.engine.native.packed import DTYPES, LANES, fields

if TYPE_CHECKING:
    from llava.engine.cache import ShardedKV


class KVBlock(ctypes.Structure):
    """The struct `KVBlock` of `common.h`: keys and values of a run of tokens."""

    _fields_ = [*fields(ctypes.c_void_p, "data"), *fields(ctypes.c_int64, "tokens layer_stride kv_stride head_stride")]

    @classmethod
    def of(cls, data: Tensor, tokens: int) -> KVBlock:
        """The first `tokens` of keys and values (layers, 2, kv_heads, P, head_dim)."""
        layer, kv, head, *inner = data.stride()
        assert inner == [data.shape[-1], 1], "tokens are contiguous"
        return cls(data.data_ptr(), tokens, layer, kv, head)


class _Call(ctypes.Structure):
    """The struct `AttentionCall` of `amx.h`."""

    _fields_ = [
        *fields(ctypes.c_int64, "rows heads kv_heads size layer causal query_stride token_stride threads"),
        *fields(ctypes.c_double, "scale"),
        *fields(ctypes.c_void_p, "starts first blocks query out"),
    ]


class PromptAttention:
    """Softmax attention of rows of queries over blocks of keys and values, the last of which are the row's own.

    Rows of different lengths need no padding, and the scores of 32 queries of a head exist at a time.
    """

    def __init__(self, lengths: Sequence[int], rows: Sequence[Sequence[KVBlock]]) -> None:
        blocks = [block for row in rows for block in row]
        self._starts = (ctypes.c_int64 * (len(lengths) + 1))(*accumulate(lengths, initial=0))
        self._first = (ctypes.c_int64 * (len(rows) + 1))(*accumulate(map(len, rows), initial=0))
        self._blocks = (KVBlock * len(blocks))(*blocks)
        self._run = function("llava_attention")

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
        return dtype == torch.bfloat16 and device.type == "cpu" and head_dim % LANES == 0 and has_tiles()

    def __call__(self, query: Tensor, kv_heads: int, token_stride: int, *, layer: int = 0, causal: bool) -> Tensor:
        """Contexts (N, heads * head_dim) of queries (N, heads, head_dim); `token_stride` is that of keys and values.

        With `causal` a row's own keys are those of its queries, and each sees those up to its own.
        """
        count, heads, size = query.shape
        assert query.stride()[1:] == (size, 1), "heads are contiguous"
        out = query.new_empty(count, heads * size)
        call = _Call(
            rows=len(self._first) - 1,
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            layer=layer,
            causal=causal,
            query_stride=query.stride(0),
            token_stride=token_stride,
            threads=torch.get_num_threads(),
            scale=size**-0.5,
            starts=ctypes.addressof(self._starts),
            first=ctypes.addressof(self._first),
            blocks=ctypes.addressof(self._blocks),
            query=query.data_ptr(),
            out=out.data_ptr(),
        )
        self._run(ctypes.byref(call))
        return out


class _Store(ctypes.Structure):
    """The struct `StoreCall` of `decode.cpp`."""

    _fields_ = [
        *fields(ctypes.c_int64, "is_bf16 rows heads kv_heads size slots row_stride kv_stride head_stride threads"),
        *fields(ctypes.c_void_p, "starts cos sin qkv data"),
    ]


class TokenStore:
    """Rotary embedding of packed rows, whose keys and values go to `data` (layers, 2, n, kv_heads, slots, head_dim).

    PyTorch takes six passes over memory for both.
    """

    def __init__(self, data: Tensor, lengths: Sequence[int]) -> None:
        self._data = data
        self._starts = (ctypes.c_int64 * (len(lengths) + 1))(*accumulate(lengths, initial=0))
        self._run = function("llava_store")

    @classmethod
    def build(cls, data: Tensor | ShardedKV, lengths: Sequence[int]) -> TokenStore | None:
        """The store, or None if the kernel is unavailable or does not support `data`."""
        if not isinstance(data, Tensor) or data.device.type != "cpu" or data.dtype not in DTYPES:
            return None
        return cls(data, lengths) if data.shape[-1] % LANES == 0 and library() is not None else None

    def __call__(self, layer: int, qkv: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Queries (N, heads, head_dim), rotated in place, of `qkv` (N, heads + 2 * kv_heads, head_dim)."""
        data = self._data[layer]
        _, rows, kv_heads, slots, size = data.shape
        heads, qkv = qkv.shape[1] - 2 * kv_heads, qkv.contiguous()
        cos, sin = (part.contiguous() for part in rotation)
        assert cos.dtype == sin.dtype == qkv.dtype == data.dtype
        kv_stride, row_stride, head_stride, *inner = data.stride()
        assert inner == [size, 1], "tokens are contiguous"
        call = _Store(
            is_bf16=data.dtype == torch.bfloat16,
            rows=rows,
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            slots=slots,
            row_stride=row_stride,
            kv_stride=kv_stride,
            head_stride=head_stride,
            threads=torch.get_num_threads(),
            starts=ctypes.addressof(self._starts),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            qkv=qkv.data_ptr(),
            data=data.data_ptr(),
        )
        self._run(ctypes.byref(call))
        return qkv[:, :heads]
