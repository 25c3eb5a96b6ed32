"""8-bit and 4-bit decoder weights with bitsandbytes (arXiv:2208.07339, arXiv:2305.14314).

Only the linear layers of the decoder are quantized; tower, projector, embeddings and head stay in 16 or 32 bit. Each
weight is quantized while the model loads, so the unquantized model is never in memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.placement import to_device
from llava.utils import require

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from peft.tuners.lora import Linear as LoraLinear

PREFIXES: Final = ("model.layers.", "transformer.blocks.")  # decoder layers of LLaMA and of MPT
BLOCK: Final = 64  # weights per scale in 4 bit
SCALES_BLOCK: Final = 256  # scales per second-level scale (double quantization, arXiv:2305.14314)
SLICE: Final = 4096 * BLOCK  # weights quantized at a time on the CPU


@dataclass(frozen=True)
class Quantizer:
    """Quantizes linear layers to `bits` 8 (LLM.int8, threshold 6) or 4; matmuls run in `dtype`.

    In 4 bit, `quant_type` is "nf4" or "fp4", and `double_quant` quantizes the block scales too.
    """

    bits: int
    dtype: torch.dtype
    device: torch.device
    quant_type: str = "nf4"
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"Weights can be quantized to 4 or 8 bits, not {self.bits}.")
        if self.device.type not in ("cuda", "cpu"):
            raise ConfigError(
                f"bitsandbytes runs on CUDA and CPU, not on {self.device.type}; remove --load-{self.bits}bit or "
                f"--bits {self.bits}."
            )
        require("bitsandbytes", "quant")
        # LLM.int8 warns at every matmul that it casts its inputs to float16, as intended.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def quantize_on_load(self, model: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Replace the linear layer of a decoder weight by a quantized one on `device`. False for other weights."""
        path, _, kind = name.rpartition(".")
        if not name.startswith(PREFIXES) or kind != "weight":
            return False
        parent, _, attribute = path.rpartition(".")
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear) or not self.supports(tensor):
            return False
        setattr(model.get_submodule(parent), attribute, self.layer(tensor, linear.bias, device))
        return True

    def supports(self, weight: Tensor) -> bool:
        """Whether `weight` can be quantized: the 4-bit CPU kernel requires a multiple of 32x64."""
        in_blocks = weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0
        return self.bits == 8 or self.device.type != "cpu" or in_blocks

    def layer(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Module:
        """A quantized linear layer of `weight` `(out, in)` on `device`."""
        bnb = require("bitsandbytes", "quant")
        width_out, width_in = weight.shape
        layer: nn.Linear  # the base class of both
        if self.bits == 4:
            scheme = {"quant_type": self.quant_type, "compress_statistics": self.double_quant}
            layer = bnb.nn.Linear4bit(width_in, width_out, bias=False, compute_dtype=self.dtype, device="meta",
                                      **scheme)  # fmt: skip
            packed, state = (
                self._quantize_4bit_sliced(weight) if device.type == "cpu" else self._quantize_4bit(weight, device)
            )
            layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True,
                                             **scheme)  # fmt: skip
            layer.quant_state = state
            # On some CPUs, its forward would repack the weights and round the scales.
            vars(layer).update(support_avx512bf16_for_cpu=False)
        else:
            layer = bnb.nn.Linear8bitLt(width_in, width_out, bias=False, has_fp16_weights=False, threshold=6.0,
                                        device="meta")  # fmt: skip
            codes, scales = self._quantize_rows(weight, device)
            layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        layer.bias = cast("nn.Parameter", bias)
        return layer

    def _quantize_rows(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """int8 codes `(out, in)` and float32 row scales `(out,)` on `device`, as from `Int8Params.to`.

        `Int8Params.to` would leave a weight already on the GPU (merged with an adapter) in 16 bit until the first
        forward. On the CPU it needs 11 bytes per weight; here rows are quantized in slices.
        """
        quantize = require("bitsandbytes", "quant").functional.int8_vectorwise_quant
        codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
        scales = torch.empty(len(weight), dtype=torch.float32, device=device)
        step = max(1, SLICE // weight.shape[1]) if device.type == "cpu" else len(weight)
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            part = to_device(weight[rows], device).to(torch.float16).contiguous()  # the CUDA kernel ignores strides
            codes[rows], scales[rows], _ = quantize(part)
        return codes, scales

    def _quantize_4bit(self, weight: Tensor, device: torch.device) -> tuple[Tensor, QuantState]:
        """Packed codes uint8 `(ceil(out * in / 2), 1)` and their state on `device`, as from `Params4bit.to`."""
        quantize = require("bitsandbytes", "quant").functional.quantize_4bit
        whole = to_device(weight, device).to(self.dtype).contiguous()
        packed, state = quantize(
            whole, blocksize=BLOCK, compress_statistics=self.double_quant, quant_type=self.quant_type
        )
        return packed, state

    def _quantize_4bit_sliced(self, weight: Tensor) -> tuple[Tensor, QuantState]:
        """The result of `_quantize_4bit` on the CPU, computed in slices: the library needs 12 bytes per weight."""
        functional = require("bitsandbytes", "quant").functional
        flat = weight.reshape(-1)
        packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8)
        scales = torch.empty(math.ceil(flat.numel() / BLOCK))
        for start in range(0, flat.numel(), SLICE):
            part = flat[start : start + SLICE].to(self.dtype)
            bits, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type=self.quant_type)
            packed[start // 2 :][: len(bits)] = bits
            scales[start // BLOCK :][: len(state.absmax)] = state.absmax
        state.shape, state.absmax = weight.shape, scales
        if self.double_quant:
            state.offset, state.nested = scales.mean(), True
            state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=SCALES_BLOCK)
        return packed, state

    def defer(self, model: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Assign a decoder weight as stored (memory-mapped if its file is), for `merge_and_quantize`."""
        path, _, kind = name.rpartition(".")
        linear = model.get_submodule(path)
        if not name.startswith(PREFIXES) or kind != "weight" or not isinstance(linear, nn.Linear):
            return False
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        return True

    def merge_and_quantize(self, model: nn.Module, where: Callable[[str], torch.device]) -> None:
        """Merge the PEFT adapter into the weights assigned by `defer`, and quantize them on the device `where(name)`.

        One layer at a time, so that only one is in 16 or 32 bit. PEFT multiplies in float32.
        """
        for name in [name for name, _ in model.named_modules()]:  # a list of modules would keep all weights alive
            if ".base_layer" not in name and ".lora_" not in name and name.startswith(PREFIXES):
                self._merge_layer(model, name, where)

    def _merge_layer(self, model: nn.Module, name: str, where: Callable[[str], torch.device]) -> None:
        """Merge the adapter, if any, of the linear layer `name` and quantize it."""
        module = model.get_submodule(name)
        linear = getattr(module, "base_layer", module)
        if not isinstance(linear, nn.Linear):
            return
        device = where(name)
        linear.weight.data = to_device(linear.weight.data, device).to(self.dtype)
        if linear is not module:
            cast("LoraLinear", module.to(device)).merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)
        self.quantize_on_load(model, f"{name}.weight", linear.weight.data, device)


def storage_name(dtype: torch.dtype, bits: int = 0) -> str:
    """The `storage` argument of `weight_bytes` for a dtype, or for `bits` 4 or 8."""
    return {4: "nf4", 8: "int8"}.get(bits, "fp32" if dtype is torch.float32 else "bf16")


def weight_bytes(name: str, shape: tuple[int, ...], storage: str) -> int:
    """Memory of one weight, with `storage` fp32, bf16, int8 or nf4; weights that are not quantized take 16 bit.

    int8 adds a float32 scale per row (arXiv:2208.07339); nf4 one byte per 64 weights and a float32 per 256 of those
    (arXiv:2305.14314).
    """
    count = math.prod(shape)
    if storage == "fp32":
        return 4 * count
    if storage == "bf16" or not name.startswith(PREFIXES) or len(shape) < 2:
        return 2 * count
    if storage == "int8":
        return count + 4 * shape[0]
    blocks = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / SCALES_BLOCK)
