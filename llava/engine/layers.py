"""Fused linear layers, RMS norm and decoder layers of a LLaMA, as the engine runs them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.engine.lora import LoraLinear, LoraStep
from llava.engine.native.build import function, library
from llava.engine.native.packed import (
    DTYPES,
    FEW_ROWS,
    GATED_SILU,
    LANES,
    NONE,
    FewRows,
    PackedLinear,
    TileLinear,
    pack_linear,
    plain_part,
)
from llava.model.language_model.lm_head import LMHead
from llava.placement import prefers_matrix_vector, runs_fused_rms_norm

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class FusedLinear:
    """Linear layers of one input as one matrix product: (N, in) to (N, sum of outs).

    The parameters of plain linear layers become views of one tensor, so memory stays the same and transformers'
    forward (beam search) uses the same weights; `state_dict` returns separate tensors. Other layers (8-bit and
    4-bit) are called one by one, on the CPU as `PackedLinear`, and `weight` is None.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules: tuple[nn.Module | PackedLinear, ...] = modules
        self.lora: LoraLinear | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.tiles: TileLinear | None = None  # runs bfloat16 inputs, if there is one
        self.few: FewRows | None = None  # runs up to `FEW_ROWS` rows of float32 inputs, if there is one
        plain = (nn.Linear, LMHead)
        linear = [module for module in modules if isinstance(module, nn.Linear) and type(module) in plain]
        biased = [module.bias is not None for module in linear]
        if len(linear) != len(modules) or any(biased) != all(biased):
            self.modules = tuple(map(pack_linear, modules))
            return
        self.weight = fuse_weights(linear, "weight")
        self.bias = fuse_weights(linear, "bias") if all(biased) else None
        self.vector = prefers_matrix_vector(self.weight.device, self.weight.dtype)
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            self.tiles = TileLinear.build(plain_part(self.weight, self.bias, torch.bfloat16))
        elif self.weight.device.type == "cpu":
            self.few = FewRows.build(plain_part(self.weight, self.bias, torch.float32))

    def __call__(
        self, x: Tensor, step: LoraStep | None = None, *, activation: int = NONE, residual: Tensor | None = None
    ) -> Tensor:
        """The product, with the terms of the adapters of `step`'s rows, plus `residual` (N, outs).

        An `activation` needs `tiles`. It comes after the terms, so it cannot be part of their product.
        """
        if step is not None and self.lora is not None:
            assert activation == NONE
            out = self.lora.add(self(x), x, step)
        elif self.tiles is not None and x.dtype == torch.bfloat16:
            return self.tiles(x, activation, residual)
        else:
            out = self._multiply(x)
        return out if residual is None else out.add_(residual)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.weight is None:
            parts = [module(x) for module in self.modules]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.few is not None and x.dtype == torch.float32 and len(x) <= FEW_ROWS:
            return self.few(x)
        if self.vector and len(x) == 1:
            out = torch.mv(self.weight, x[0])
            return (out if self.bias is None else out + self.bias).unsqueeze(0)
        return F.linear(x, self.weight, self.bias)


def fuse_weights(modules: Sequence[nn.Linear], name: str) -> Tensor:
    """Concatenate a parameter of all modules and make the parameters views of the result, unless they already are."""
    parameters = [module.get_parameter(name) for module in modules]
    first = parameters[0].data
    offset = first.storage_offset()
    fused = True
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        fused = fused and same and parameter.is_contiguous() and bool(parameter.storage_offset() == offset)
        offset += parameter.numel()
    if fused:
        rows = sum(map(len, parameters))
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([parameter.data for parameter in parameters])
    views = torch.split(whole, [len(parameter) for parameter in parameters])
    for module, parameter, view in zip(modules, parameters, views, strict=True):
        parameter.data = view
        module._register_state_dict_hook(_clone_state)  # type: ignore[no-untyped-call]
    return whole


def _clone_state(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """State dict hook: checkpoint writers refuse, or drop, tensors that share storage."""
    for name in ("weight", "bias"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = state[f"{prefix}{name}"].clone()


class RMSNorm:
    """Root mean square norm (Zhang and Sennrich, 2019), in float32 and scaled in the model's dtype, as in transformers.

    On CUDA it is torch's fused kernel, on the CPU a C++ kernel. Both scale before rounding, in one pass instead of six
    and with a smaller error.
    """

    def __init__(self, module: LlamaRMSNorm) -> None:
        self.weight: Tensor = module.weight
        self.eps: float = module.variance_epsilon
        fits = self.weight.device.type == "cpu" and self.weight.dtype in DTYPES and len(self.weight) % LANES == 0
        self.native: Any = None
        if fits and library() is not None:
            pointer, number = ctypes.c_void_p, ctypes.c_int64
            arguments = (pointer, number, number, pointer, ctypes.c_double, number, pointer, number)
            self.native = function("llava_rms_norm", *arguments)

    def __call__(self, x: Tensor) -> Tensor:
        if runs_fused_rms_norm(x, self.weight):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if self.native is not None and x.dtype == self.weight.dtype:
            return self._run_native(x.contiguous())
        x32 = x.float()
        scale = x32.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (x32 * scale).to(x.dtype) * self.weight

    def _run_native(self, x: Tensor) -> Tensor:
        out, (*_, width) = torch.empty_like(x), x.shape
        pointers = [tensor.data_ptr() for tensor in (x, self.weight, out)]
        bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
        self.native(pointers[0], x.numel() // width, width, pointers[1], self.eps, bf16, pointers[2], threads)
        return out


class DecoderLayer:
    """Weights of one LLaMA layer, with q, k, v and gate, up fused; all on `device`."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.device: torch.device = layer.input_layernorm.weight.device
        self.norm = RMSNorm(layer.input_layernorm)
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = FusedLinear(attention.o_proj)
        self.mlp_norm = RMSNorm(layer.post_attention_layernorm)
        self.gate_up = FusedLinear(mlp.gate_proj, mlp.up_proj)
        self.activation: nn.Module = mlp.act_fn
        self.down = FusedLinear(mlp.down_proj)
        self.in_place = isinstance(self.activation, nn.SiLU) and self.down.weight is not None
        tiles = self.gate_up.tiles
        self.gated = self.in_place and tiles is not None and tiles.part.rows % (2 * LANES) == 0

    @property
    def projections(self) -> tuple[FusedLinear, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    def feed_forward(self, x: Tensor, lora: LoraStep | None = None) -> Tensor:
        """MLP with its residual, (N, D) to (N, D)."""
        if self.gated and lora is None:
            return self.down(self.gate_up(self.mlp_norm(x), activation=GATED_SILU), residual=x)
        gate, up = self.gate_up(self.mlp_norm(x), lora).chunk(2, dim=-1)
        if self.in_place:  # allocating memory for a long prompt costs as much as the arithmetic
            return self.down(F.silu(gate, inplace=True).mul_(up), lora, residual=x)
        return x + self.down(self.activation(gate) * up, lora)
