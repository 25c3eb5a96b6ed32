"""LLaMA's decode step as one call of the C++ kernel `decode.cpp`, for small batches on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.engine.cache import KVCache
from llava.engine.linear import Product
from llava.engine.native.build import library

if TYPE_CHECKING:
    from llava.engine.llama import LlamaRunner

LANES = 16
_Fields = list[tuple[str, type]]


def _fields(kind: type, names: str) -> _Fields:
    return [(name, kind) for name in names.split()]


# The structures of `decode.cpp`, field by field; all of eight bytes, so without gaps.
class _Layer(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "norm mlp_norm qkv_bias out_bias gate_up_bias down_bias qkv out gate_up down")


class _Model(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "half layers width heads kv_heads head_dim intermediate vocabulary"),
        *_fields(ctypes.c_double, "eps"),
        *_fields(ctypes.c_void_p, "norm head_bias head layer"),
    ]


class _Span(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_void_p, "data"), *_fields(ctypes.c_int64, "tokens layer kind head")]


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "rows threads longest"),
        *_fields(ctypes.c_void_p, "states cos sin logits first spans"),
    ]


class NativeDecoder:
    """The kernel with one model's weights. Arithmetic is float32, whatever the weights'."""

    def __init__(self, lm: LlamaRunner) -> None:
        self._kept: list[Tensor] = []  # what the pointers lead to
        self._run = library().llava_decode_step  # type: ignore[union-attr]
        self._run.argtypes, self._run.restype = [ctypes.c_void_p, ctypes.c_void_p], None
        layers = (_Layer * len(lm.layers))()
        for record, layer in zip(layers, lm.layers, strict=True):
            record.norm, record.mlp_norm = self._wide(layer.norm.weight), self._wide(layer.mlp_norm.weight)
            for name in ("qkv", "out", "gate_up", "down"):
                product: Product = getattr(layer, name)
                setattr(record, name, self._keep(product.weight))
                setattr(record, f"{name}_bias", self._wide(product.bias))
        head = lm.head.weight
        assert head is not None
        self.vocabulary, self.width = head.shape
        spec = lm.spec
        down = lm.layers[0].down.weight
        assert down is not None
        self._layers = layers
        self._model = _Model(
            half=spec.dtype == torch.bfloat16,
            layers=spec.layers,
            width=self.width,
            heads=lm.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=down.shape[1],
            vocabulary=self.vocabulary,
            eps=lm.norm.eps,
            norm=self._wide(lm.norm.weight),
            head=self._keep(head),
            head_bias=self._wide(lm.head.bias),
            layer=ctypes.addressof(layers),
        )

    @staticmethod
    def runs(lm: LlamaRunner) -> bool:
        """Plain weights in float32 or bfloat16 on the CPU, the usual activation, and sizes of whole vectors."""
        spec, config = lm.spec, lm.model.config
        products = [
            lm.head,
            *(part for layer in lm.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)),
        ]
        weights = [product.weight for product in products]
        sizes = (config.hidden_size, config.intermediate_size, spec.head_dim)
        return (
            spec.device.type == "cpu"
            and spec.dtype in (torch.float32, torch.bfloat16)
            and config.hidden_act == "silu"
            and all(weight is not None and weight.dtype == spec.dtype and weight.is_contiguous() for weight in weights)
            and not any(size % LANES for size in sizes)
            and library() is not None
        )

    def step(self, embeds: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        """The next token of every row, (B, D), turned by `cos` and signed `sin` (B, 1, head_dim): its keys and values
        are written behind the row's own in `cache`; its logits (B, V) float32 come back."""
        count = len(embeds)
        states = embeds.float().clone(memory_format=torch.contiguous_format)
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        logits = torch.empty(count, self.vocabulary)
        spans, first, longest = self._spans(cache)
        step = _Step(
            rows=count,
            threads=torch.get_num_threads(),
            longest=longest,
            states=states.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            logits=logits.data_ptr(),
            first=ctypes.addressof(first),
            spans=ctypes.addressof(spans),
        )
        self._run(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    @staticmethod
    def _spans(cache: KVCache) -> tuple[Any, Any, int]:
        """Where every row's keys and values lie: the spans, each row's first one, and the columns of the longest."""
        found: list[_Span] = []
        first, longest = [0], 0
        for row, (spans, length) in enumerate(zip(cache.chains, cache.lengths, strict=True)):
            parts: Sequence[tuple[Tensor, int]] = [
                *((span.data, span.tokens) for span in spans),
                (cache.data[:, :, row, :, cache.end - length :], length),
            ]
            for data, tokens in parts:
                layer, kind, head, *inner = data.stride()
                assert inner == [data.shape[-1], 1], "columns lie one behind the other"
                found.append(_Span(data.data_ptr(), tokens, layer, kind, head))
            first.append(len(found))
            longest = max(longest, sum(tokens for _, tokens in parts) + 1)
        return (_Span * len(found))(*found), (ctypes.c_int64 * len(first))(*first), longest

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _wide(self, tensor: Tensor | None) -> int | None:
        """Small tensors in float32."""
        return None if tensor is None else self._keep(tensor.detach().float().contiguous())
