"""LoRA adapters for the C++ kernel: records of their matrices, and the rows of a step ordered by adapter."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.engine.lora import LoraLinear, LoraStep, Pair
from llava.engine.native.packed import PLAIN, Part, Record, fields


# The structs of `decode.cpp`, field by field; all fields have eight bytes, so there is no padding.
class _LowRank(ctypes.Structure):
    _fields_ = [*fields(ctypes.c_int64, "parts rank"), *fields(ctypes.c_void_p, "down up")]


class _Adapted(ctypes.Structure):
    _fields_ = [*fields(ctypes.c_int64, "first count"), *fields(ctypes.c_void_p, "layers")]


@dataclass(frozen=True)
class NativeRows:
    """Rows of a step ordered by adapter, those of the base first: `order` (B,) and its `inverse`, and the records of
    the others."""

    order: Tensor
    inverse: Tensor
    count: int
    rank: int
    address: int
    records: object


class NativeLora:
    """The adapters of a model's fused linear layers, four per decoder layer."""

    def __init__(self, linears: Sequence[LoraLinear]) -> None:
        self._alive: list[object] = []  # the memory behind the pointers
        self._ranks = [0] * len(linears[0].parts)
        self._layers = [self._records(linears, adapter) for adapter in range(len(self._ranks))]
        self._last: tuple[LoraStep, NativeRows] | None = None

    def rows(self, step: LoraStep) -> NativeRows:
        """The rows of a step; those of the last one are kept."""
        if self._last is None or self._last[0] is not step:
            order = torch.tensor(step.adapters).argsort(stable=True)
            found, first = [], step.adapters.count(0)
            for adapter in step.present:
                count = step.adapters.count(adapter)
                found.append(_Adapted(first, count, ctypes.addressof(self._layers[adapter])))
                first += count
            records, rank = (_Adapted * len(found))(*found), max(self._ranks[adapter] for adapter in step.present)
            rows = NativeRows(order, order.argsort(), len(found), rank, ctypes.addressof(records), records)
            self._last = step, rows
        return self._last[1]

    def _records(self, linears: Sequence[LoraLinear], adapter: int) -> ctypes.Array[_LowRank]:
        records = (_LowRank * len(linears))()
        for record, linear in zip(records, linears, strict=True):
            pairs = linear.parts[adapter]
            rank = max((len(pair[0]) for pair in pairs if pair is not None), default=0)
            self._ranks[adapter] = max(self._ranks[adapter], rank)
            record.parts, record.rank = len(pairs), rank
            parts = [_parts(pair, size, rank) for pair, size in zip(pairs, linear.sizes, strict=True)]
            for name, side in zip(("down", "up"), zip(*parts, strict=True), strict=True):
                array = (Record * len(side))(*(part.record for part in side))
                self._alive += [array, side]
                setattr(record, name, ctypes.addressof(array))
        return records


def _parts(pair: Pair | None, size: int, rank: int) -> tuple[Part, Part]:
    """A (rank, in), and B as a copy (rank, size); without data if the layer is not adapted."""
    down, up = (None, None) if pair is None else (pair[0].contiguous(), pair[1].t().contiguous())
    width = 0 if down is None else down.shape[1]
    return Part(PLAIN, rank, width, {"data": down, "bias": None}), Part(PLAIN, size, rank, {"data": up, "bias": None})
