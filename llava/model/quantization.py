"""8-bit and 4-bit linear layers of the language model, through bitsandbytes (arXiv:2208.07339, arXiv:2305.14314).

Only the decoder's linear layers are quantised; tower, projector, embeddings and head keep 16-bit or 32-bit
precision. Each weight is quantised as it is read, so neither the 16-bit model nor extra copies are ever in memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.placement import to_device
from llava.utils import require

PREFIXES = ("model.layers.", "transformer.blocks.")  # of LLaMA, of MPT
BLOCK, SCALES_BLOCK = 64, 256  # weights that share a scale, and scales that share one (arXiv:2305.14314, §3)
SLICE = 4096 * BLOCK  # weights packed at a time on a CPU


@dataclass(frozen=True)
class Quantizer:
    """`bits` 8 (LLM.int8, threshold 6) or 4; products are computed in `dtype`.

    4 bits: `quant_type` "nf4" or "fp4"; `double_quant` quantises the scales of the blocks as well.
    """

    bits: int
    dtype: torch.dtype
    device: torch.device
    quant_type: str = "nf4"
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"Weights can be quantised to 4 or 8 bits, not {self.bits}.")
        if self.device.type not in ("cuda", "cpu"):
            raise ConfigError(
                f"bitsandbytes runs on CUDA and CPU, not on {self.device.type}; leave out --load-{self.bits}bit "
                f"or --bits {self.bits}."
            )
        require("bitsandbytes", "quant")
        # In 8 bit it warns at every product that its inputs become float16, which is as it should be.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def quantize_on_load(self, model: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Put a decoder weight into a quantised layer on `device`, in its module's place; false for what stays."""
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
        """On a CPU the 4-bit kernel takes blocks of 32x64 weights; a layer of another shape stays in full precision."""
        blocks = weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0
        return self.bits == 8 or self.device.type != "cpu" or blocks

    def layer(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Module:
        """A quantised linear layer with `weight` `(out, in)` on `device`."""
        bnb = require("bitsandbytes", "quant")
        width_out, width_in = weight.shape
        layer: Any
        if self.bits == 4:
            scheme = {"quant_type": self.quant_type, "compress_statistics": self.double_quant}
            layer = bnb.nn.Linear4bit(width_in, width_out, bias=False, compute_dtype=self.dtype, device="meta",
                                      **scheme)  # fmt: skip
            packed, state = self._pack(weight) if device.type == "cpu" else self._quantize_4bit(weight, device)
            layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True,
                                             **scheme)  # fmt: skip
            layer.quant_state = state
        else:
            layer = bnb.nn.Linear8bitLt(width_in, width_out, bias=False, has_fp16_weights=False, threshold=6.0,
                                        device="meta")  # fmt: skip
            codes, scales = self._quantize_rows(weight, device)
            layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        layer.bias = bias
        module: nn.Module = layer
        return module

    def _quantize_rows(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """int8 codes `(out, in)` and float32 row scales `(out,)` on `device`, as `Int8Params.to` creates them.

        `Int8Params.to` quantises only CPU tensors, so a weight already on the GPU (with a merged adapter) would stay
        16-bit until the first forward. On the CPU it needs 11 bytes per weight, so rows go in slices.
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

    def _quantize_4bit(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Packed codes uint8 `(ceil(out * in / 2), 1)` and their state on `device`, as `Params4bit.to` creates them."""
        quantize = require("bitsandbytes", "quant").functional.quantize_4bit
        whole = to_device(weight, device).to(self.dtype).contiguous()
        packed, state = quantize(
            whole, blocksize=BLOCK, compress_statistics=self.double_quant, quant_type=self.quant_type
        )
        return packed, state

    def _pack(self, weight: Tensor) -> tuple[Tensor, Any]:
        """What `quantize_4bit` of the library gives for the whole `weight`, made a slice at a time.

        Its way on a CPU takes twelve bytes a weight; one of the slices overwrites those of the one before.
        """
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
        """Quantise what `defer` put in place, on the device that `where(name)` gives, merging PEFT's part first.

        Layer by layer, so that no two are there in 16 or 32 bit. PEFT's products are computed in float32.
        """
        for name in [name for name, _ in model.named_modules()]:  # a list of modules would keep all weights alive
            if ".base_layer" not in name and ".lora_" not in name and name.startswith(PREFIXES):
                self._merge_and_place(model, name, where)

    def _merge_and_place(self, model: nn.Module, name: str, where: Callable[[str], torch.device]) -> None:
        """Merge the adapter (if any) of the module `name` and quantise it; only linear layers are changed."""
        module = model.get_submodule(name)
        linear = getattr(module, "base_layer", module)
        if not isinstance(linear, nn.Linear):
            return
        device = where(name)
        linear.weight.data = to_device(linear.weight.data, device).to(self.dtype)
        if linear is not module:
            layer: Any = module.to(device)
            layer.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)
        self.quantize_on_load(model, f"{name}.weight", linear.weight.data, device)


def size_name(dtype: torch.dtype, bits: int = 0) -> str:
    """What `weight_bytes` calls a dtype, or weights packed to `bits`."""
    return {4: "nf4", 8: "int8"}.get(bits, "fp32" if dtype is torch.float32 else "bf16")


def weight_bytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Memory of one weight. Quantised loads pack the decoder's matrices only; the rest stays in 16 bit.

    int8 keeps a float32 scale a row (arXiv:2208.07339); nf4 half a byte a weight, one byte for each 64 weights and a
    float32 for each 256 of those (arXiv:2305.14314).
    """
    count = math.prod(shape)
    if dtype == "fp32":
        return 4 * count
    if dtype == "bf16" or not name.startswith(PREFIXES) or len(shape) < 2:
        return 2 * count
    if dtype == "int8":
        return count + 4 * shape[0]
    blocks = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / SCALES_BLOCK)
