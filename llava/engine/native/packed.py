"""Linear layers of the C++ kernels: parameters of PyTorch, or the packed weights of bitsandbytes, read in place.

The values are as dequantized by bitsandbytes: int8 times a float32 scale per row (arXiv:2208.07339), or a value of NF4
or FP4 times a scale per block of 64 (arXiv:2305.14314). Inputs are not quantized, unlike in LLM.int8.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.engine.native.build import function, has_tiles, library
from llava.model.quantization import BLOCK, SCALES_BLOCK

LANES: Final = 16  # floats per vector of the kernel
DTYPES: Final = (torch.float32, torch.bfloat16)
PLAIN, INT8, FOUR_BIT = 0, 1, 2
SLICE: Final = 2**20  # weights dequantized at a time
NONE, QUICK_GELU, GELU, GATED_SILU = range(4)  # activations of a `TileLinear`
TILE_WIDTH: Final = 32  # inputs of a tile
FEW_ROWS: Final = 32  # in float32; for more, PyTorch's product is faster


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Record(ctypes.Structure):
    """The struct `Part` of `common.h`; all fields have eight bytes, so there is no padding."""

    _fields_ = [
        *fields(ctypes.c_int64, "kind rows width"),
        *fields(ctypes.c_void_p, "data bias scales values scale_codes scale_values"),
        *fields(ctypes.c_double, "scale_offset"),
    ]


@dataclass(frozen=True)
class Part:
    """Outputs of a linear layer for the kernel, and the tensors behind its pointers."""

    kind: int
    rows: int
    width: int
    tensors: dict[str, Tensor | None]
    scale_offset: float = 0.0
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in self.tensors.items()}
        record = Record(kind=self.kind, rows=self.rows, width=self.width, scale_offset=self.scale_offset, **pointers)
        object.__setattr__(self, "record", record)


def plain_part(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Part | None:
    """The `Part` of a weight (out, in) in the model's `dtype`; None if the kernel does not support it."""
    if weight.dtype != dtype or not weight.is_contiguous() or weight.shape[1] % LANES:
        return None
    rows, width = weight.shape
    return Part(PLAIN, rows, width, {"data": weight, "bias": as_float32(bias)})


def packed_part(layer: Any) -> Part | None:
    """The `Part` of an 8-bit or 4-bit layer of bitsandbytes on the CPU; None for other layers and layouts."""
    if not type(layer).__module__.startswith("bitsandbytes.") or layer.weight.device.type != "cpu":
        return None
    weight, bias, rows, width = (
        layer.weight.data,
        as_float32(layer.bias),
        int(layer.out_features),
        int(layer.in_features),
    )
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # moved at the first forward
        if weight.dtype != torch.int8 or scales is None or not weight.is_contiguous() or width % LANES:
            return None
        return Part(INT8, rows, width, {"data": weight, "bias": bias, "scales": scales})
    nested = getattr(state, "state2", None)
    in_blocks = width % BLOCK == 0 and state.blocksize == BLOCK and tuple(state.shape) == (rows, width)
    repacked = getattr(state, "packing_format_for_cpu", False)  # by a forward in bitsandbytes
    if not in_blocks or repacked or (nested is not None and nested.blocksize != SCALES_BLOCK):
        return None
    tensors = {"data": weight, "bias": bias, "values": state.code, "scales": state.absmax}
    if nested is not None:
        tensors.update(scales=nested.absmax, scale_codes=state.absmax, scale_values=nested.code)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    return Part(FOUR_BIT, rows, width, tensors, 0.0 if nested is None else float(state.offset))


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """A float32 copy of a bias."""
    return None if tensor is None else tensor.detach().float().contiguous()


class _Call(ctypes.Structure):
    """The struct `LinearCall` of `amx.h`."""

    _fields_ = [
        *fields(ctypes.c_void_p, "part"),
        *fields(ctypes.c_int64, "count activation threads"),
        *fields(ctypes.c_void_p, "x residual out"),
    ]


class TileLinear:
    """A bfloat16 linear layer on the tiles of Intel AMX, with an activation and a residual sum in the same pass.

    The weight is read in place and sums are float32. `GATED_SILU` halves the outputs: SiLU of the first half times the
    second (Shazeer, "GLU Variants Improve Transformer", 2020).
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self._run = function("llava_linear")

    @classmethod
    def build(cls, part: Part | None) -> TileLinear | None:
        """The layer, or None without tiles or for widths that do not fill them."""
        supported = part is not None and has_tiles() and part.width % TILE_WIDTH == 0
        return cls(part) if part is not None and supported else None

    def __call__(self, x: Tensor, activation: int = NONE, residual: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out), bfloat16; `residual` (..., out) is added."""
        x = x.contiguous()
        outputs = self.part.rows // 2 if activation == GATED_SILU else self.part.rows
        out = x.new_empty(*x.shape[:-1], outputs)
        added = None if residual is None else residual.contiguous()
        call = _Call(
            part=ctypes.addressof(self.part.record),
            count=x.numel() // self.part.width,
            activation=activation,
            threads=torch.get_num_threads(),
            x=x.data_ptr(),
            residual=None if added is None else added.data_ptr(),
            out=out.data_ptr(),
        )
        self._run(ctypes.byref(call))
        return out


class FewRows:
    """A linear layer in float32 for at most `FEW_ROWS` rows, which reads its weight once."""

    def __init__(self, part: Part) -> None:
        self.part = part
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._run = function("llava_few_rows", pointer, pointer, number, pointer, number)

    @classmethod
    def build(cls, part: Part | None) -> FewRows | None:
        return None if part is None or library() is None else cls(part)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out), float32."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.part.rows)
        part, threads = ctypes.addressof(self.part.record), torch.get_num_threads()
        self._run(part, x.data_ptr(), len(x), out.data_ptr(), threads)
        return out


class PackedLinear:
    """A bitsandbytes layer that runs in the kernels.

    In float32 and without AMX, a call with many tokens dequantizes slices of its weight for PyTorch's matrix product.
    """

    def __init__(self, layer: Any, part: Part) -> None:
        self.layer, self.part = layer, part
        self.tiles, self.few = TileLinear.build(part), FewRows(part)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._unpack = function("llava_unpack", pointer, number, number, number, pointer, number)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        if x.dtype not in DTYPES:
            out: Tensor = self.layer(x)
            return out
        if x.dtype == torch.bfloat16 and self.tiles is not None:
            return self.tiles(x)
        rows, bias = self.part.rows, self.layer.bias
        if len(x) <= FEW_ROWS:
            return self.few(x.float()).to(x.dtype)
        step = max(1, SLICE // self.part.width)
        buffer = x.new_empty(min(step, rows), self.part.width)
        outputs = []
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            weight = self.unpack(start, stop, buffer[: stop - start])
            outputs.append(F.linear(x, weight, None if bias is None else bias[start:stop].to(x.dtype)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def unpack(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write the weights of rows `start` to `stop` - 1 to `out` (stop - start, in), float32 or bfloat16."""
        bf16, threads = out.dtype == torch.bfloat16, torch.get_num_threads()
        self._unpack(ctypes.addressof(self.part.record), start, stop, bf16, out.data_ptr(), threads)
        return out


def pack_linear(layer: nn.Module) -> nn.Module | PackedLinear:
    """A `PackedLinear` where the kernel supports the layer, else the layer itself."""
    part = packed_part(layer)
    return PackedLinear(layer, part) if part is not None and library() is not None else layer


def part_of(layer: nn.Module | PackedLinear, dtype: torch.dtype) -> Part | None:
    """The part of one layer in a model of `dtype`; None if the kernel does not support it."""
    if isinstance(layer, PackedLinear):
        return layer.part
    return plain_part(layer.weight, layer.bias, dtype) if type(layer) is nn.Linear else None
