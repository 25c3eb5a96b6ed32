"""Decode step of a LLaMA in one call of the C++ kernel `decode.cpp`, for small batches on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from llava.engine.cache import CacheSpec, KVCache
from llava.engine.layers import DecoderLayer, FusedLinear, RMSNorm
from llava.engine.lora import LoraStep
from llava.engine.native.attention import KVBlock
from llava.engine.native.build import function, has_tiles, library
from llava.engine.native.lora import NativeLora
from llava.engine.native.packed import DTYPES, LANES, PLAIN, Part, Record, fields, part_of, plain_part
from llava.placement import native_decode_rows


# The structs of `decode.cpp`, field by field; all fields have eight bytes, so there is no padding.
class _Layer(ctypes.Structure):
    _fields_ = fields(ctypes.c_void_p, "norm mlp_norm qkv out gate_up down")


class _Model(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "is_bf16 tiles num_layers hidden heads kv_heads head_dim intermediate vocabulary"),
        *fields(ctypes.c_double, "eps"),
        *fields(ctypes.c_void_p, "norm head layers"),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "rows threads longest"),
        *fields(ctypes.c_void_p, "states cos sin logits first blocks"),
        *fields(ctypes.c_int64, "num_adapted max_rank"),
        *fields(ctypes.c_void_p, "adapted"),
    ]


class NativeDecoder:
    """The kernel with the weights of one float32 or bfloat16 model, whose linear layers may be 8-bit or 4-bit."""

    def __init__(
        self, spec: CacheSpec, heads: int, layers: Sequence[DecoderLayer], norm: RMSNorm, parts: Sequence[list[Part]]
    ) -> None:
        self._alive: list[object] = []  # the memory behind the pointers
        self.lora: NativeLora | None = None
        self._run = function("llava_decode_step", ctypes.c_void_p, ctypes.c_void_p)
        self._layers = (_Layer * len(layers))()
        head, *projections = parts
        for index, (record, layer) in enumerate(zip(self._layers, layers, strict=True)):
            record.norm, record.mlp_norm = self._float32(layer.norm.weight), self._float32(layer.mlp_norm.weight)
            for name, found in zip(("qkv", "out", "gate_up", "down"), projections[4 * index :][:4], strict=True):
                setattr(record, name, self._records(found))
        self.vocabulary = sum(part.rows for part in head)
        tiles = spec.dtype == torch.bfloat16 and has_tiles()
        packed = any(part.kind != PLAIN for found in parts for part in found)  # their products do not run on tiles
        self.max_rows = native_decode_rows(spec.dtype, tiles=tiles and not packed)
        self._model = _Model(
            is_bf16=spec.dtype == torch.bfloat16,
            tiles=tiles,
            num_layers=spec.layers,
            hidden=head[0].width,
            heads=heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=projections[3][0].width,
            vocabulary=self.vocabulary,
            eps=norm.eps,
            norm=self._float32(norm.weight),
            head=self._records(head),
            layers=ctypes.addressof(self._layers),
        )

    @classmethod
    def build(
        cls, spec: CacheSpec, heads: int, layers: Sequence[DecoderLayer], norm: RMSNorm, head: FusedLinear
    ) -> NativeDecoder | None:
        """The decoder, or None if the kernel is unavailable or does not support the model.

        It supports float32 and bfloat16 models on the CPU, with weights of that dtype or packed by bitsandbytes, SiLU,
        and sizes that are multiples of `LANES`.
        """
        supported = (
            spec.device.type == "cpu"
            and spec.dtype in DTYPES
            and spec.head_dim % LANES == 0
            and all(isinstance(layer.activation, nn.SiLU) for layer in layers)
            and library() is not None
        )
        linears = [head, *(linear for layer in layers for linear in layer.projections)] if supported else []
        parts = [_parts(linear, spec.dtype) for linear in linears]
        complete = [part for part in parts if part is not None]
        return cls(spec, heads, layers, norm, complete) if supported and len(complete) == len(parts) else None

    def step(self, embeds: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, lora: LoraStep | None = None) -> Tensor:
        """Logits (B, V) float32 of embeddings (B, D), rotated by `cos` and signed `sin` (B, 1, head_dim).

        Writes the keys and values of the new tokens to `cache`. `lora` are the adapters of the rows.
        """
        count = len(embeds)
        rows = None if lora is None or self.lora is None else self.lora.rows(lora)
        if rows is not None:
            embeds, cos, sin = embeds[rows.order], cos[rows.order], sin[rows.order]
        states = embeds.float().clone(memory_format=torch.contiguous_format)
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        logits = torch.empty(count, self.vocabulary)
        found, first, longest = _kv_blocks(cache, range(count) if rows is None else rows.order.tolist())
        blocks, firsts = (KVBlock * len(found))(*found), (ctypes.c_int64 * len(first))(*first)
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
        if rows is not None:
            step.num_adapted, step.max_rank, step.adapted = rows.count, rows.rank, rows.address
        self._run(ctypes.byref(self._model), ctypes.byref(step))
        return logits if rows is None else logits[rows.inverse]

    def _records(self, parts: list[Part]) -> int:
        """Address of the records of a linear layer's parts."""
        records = (Record * len(parts))(*(part.record for part in parts))
        self._alive += [records, parts]
        return ctypes.addressof(records)

    def _float32(self, tensor: Tensor) -> int:
        """Pointer to a float32 copy of a norm."""
        copy = tensor.detach().float().contiguous()
        self._alive.append(copy)
        return copy.data_ptr()


def _parts(linear: FusedLinear, dtype: torch.dtype) -> list[Part] | None:
    """The parts of a linear layer; None if the kernel does not support one."""
    if linear.weight is not None:
        parts = [plain_part(linear.weight, linear.bias, dtype)]
    else:
        parts = [part_of(module, dtype) for module in linear.modules]
    complete = [part for part in parts if part is not None]
    return complete if len(complete) == len(parts) else None


def _kv_blocks(cache: KVCache, rows: Iterable[int]) -> tuple[list[KVBlock], list[int], int]:
    """Contiguous blocks of keys and values of `rows`, the index of each row's first one and the number of blocks, and
    the tokens of the longest row with its new one."""
    blocks: list[KVBlock] = []
    first, longest = [0], 0
    layer, kv, row_stride, head, slot, one = cache.data.stride()
    assert (slot, one) == (cache.data.shape[-1], 1), "tokens are contiguous"
    start, size = cache.data.data_ptr(), cache.data.itemsize
    for row in rows:
        length = cache.lengths[row]
        shared = [KVBlock.of(match.node.data, match.num_tokens) for match in cache.prefixes[row]]
        own = start + (row * row_stride + (cache.end - length) * slot) * size
        blocks += [*shared, KVBlock(own, length, layer, kv, head)]
        first.append(len(blocks))
        longest = max(longest, sum(block.tokens for block in shared) + length + 1)
    return blocks, first, longest
