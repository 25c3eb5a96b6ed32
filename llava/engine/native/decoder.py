"""Decode step of a LLaMA in one call of the C++ kernel `decode.cpp`, for small batches on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from llava.engine.cache import CacheSpec, KVCache
from llava.engine.layers import DecoderLayer, FusedLinear, RMSNorm
from llava.engine.native.build import library

LANES: Final = 16  # floats per vector of the kernel


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


# The structs of `decode.cpp`, field by field; all fields have eight bytes, so there is no padding.
class _Layer(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "norm mlp_norm qkv_bias out_bias gate_up_bias down_bias qkv out gate_up down")


class _Model(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "is_bf16 num_layers hidden heads kv_heads head_dim intermediate vocabulary"),
        *_fields(ctypes.c_double, "eps"),
        *_fields(ctypes.c_void_p, "norm head_bias head layers"),
    ]


class _KVBlock(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "data"),
        *_fields(ctypes.c_int64, "tokens layer_stride kv_stride head_stride"),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "rows threads longest"),
        *_fields(ctypes.c_void_p, "states cos sin logits first blocks"),
    ]


class NativeDecoder:
    """The kernel with the weights of one model, float32 or bfloat16. All arithmetic is in float32."""

    def __init__(
        self, spec: CacheSpec, heads: int, layers: Sequence[DecoderLayer], norm: RMSNorm, head: FusedLinear
    ) -> None:
        self._tensors: list[Tensor] = []  # keeps the memory behind the pointers alive
        self._run = library().llava_decode_step  # type: ignore[union-attr]
        self._run.argtypes, self._run.restype = [ctypes.c_void_p, ctypes.c_void_p], None
        self._layers = (_Layer * len(layers))()
        for record, layer in zip(self._layers, layers, strict=True):
            record.norm, record.mlp_norm = self._float32(layer.norm.weight), self._float32(layer.mlp_norm.weight)
            for name, linear in zip(("qkv", "out", "gate_up", "down"), layer.projections, strict=True):
                setattr(record, name, self._pointer(linear.weight))
                setattr(record, f"{name}_bias", self._float32(linear.bias))
        assert head.weight is not None and layers[0].down.weight is not None
        self.vocabulary, hidden = head.weight.shape
        self._model = _Model(
            is_bf16=spec.dtype == torch.bfloat16,
            num_layers=spec.layers,
            hidden=hidden,
            heads=heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=layers[0].down.weight.shape[1],
            vocabulary=self.vocabulary,
            eps=norm.eps,
            norm=self._float32(norm.weight),
            head=self._pointer(head.weight),
            head_bias=self._float32(head.bias),
            layers=ctypes.addressof(self._layers),
        )

    @classmethod
    def build(
        cls, spec: CacheSpec, heads: int, layers: Sequence[DecoderLayer], norm: RMSNorm, head: FusedLinear
    ) -> NativeDecoder | None:
        """The decoder, or None if the kernel is unavailable or does not support the model.

        It supports unquantised float32 or bfloat16 weights on the CPU, SiLU, and sizes that are multiples of `LANES`.
        """
        weights = [linear.weight for linear in (head, *(part for layer in layers for part in layer.projections))]
        supported = (
            spec.device.type == "cpu"
            and spec.dtype in (torch.float32, torch.bfloat16)
            and all(isinstance(layer.activation, nn.SiLU) for layer in layers)
            and all(weight is not None and weight.dtype == spec.dtype and weight.is_contiguous() for weight in weights)
            and not any(size % LANES for weight in weights if weight is not None for size in weight.shape[1:])
            and spec.head_dim % LANES == 0
        )
        return cls(spec, heads, layers, norm, head) if supported and library() is not None else None

    def step(self, embeds: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) float32 of embeddings (B, D), rotated by `cos` and signed `sin` (B, 1, head_dim).

        Writes the keys and values of the new tokens to `cache`.
        """
        count = len(embeds)
        states = embeds.float().clone(memory_format=torch.contiguous_format)
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        logits = torch.empty(count, self.vocabulary)
        found, first, longest = _kv_blocks(cache)
        blocks, firsts = (_KVBlock * len(found))(*found), (ctypes.c_int64 * len(first))(*first)
        step = _Step(
            rows=count,
            threads=torch.get_num_threads(),
            longest=longest,
            states=states.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            logits=logits.data_ptr(),
            first=ctypes.addressof(firsts),
            blocks=ctypes.addressof(blocks),
        )
        self._run(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _float32(self, tensor: Tensor | None) -> int | None:
        """Pointer to a float32 copy of a norm or bias."""
        return None if tensor is None else self._pointer(tensor.detach().float().contiguous())


def _kv_blocks(cache: KVCache) -> tuple[list[_KVBlock], list[int], int]:
    """Contiguous blocks of keys and values of all rows, the index of each row's first one and the number of blocks, and
    the tokens of the longest row with its new one."""
    blocks: list[_KVBlock] = []
    first, longest = [0], 0
    for row, (prefix, length) in enumerate(zip(cache.prefixes, cache.lengths, strict=True)):
        parts: list[tuple[Tensor, int]] = [(match.data, match.num_tokens) for match in prefix]
        parts.append((cache.data[:, :, row, :, cache.end - length :], length))
        for data, tokens in parts:
            layer, kv, head, *inner = data.stride()
            assert inner == [data.shape[-1], 1], "tokens are contiguous"
            blocks.append(_KVBlock(data.data_ptr(), tokens, layer, kv, head))
        first.append(len(blocks))
        longest = max(longest, sum(tokens for _, tokens in parts) + 1)
    return blocks, first, longest
