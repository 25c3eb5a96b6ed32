"""Parts of LLaMA's decoder layer that save less for the backward pass and recompute elementwise results.

A norm and the linear layers after it run as one function, unless a layer is an adapter, is quantized, has hooks, or has
its weight gathered by ZeRO-3 when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from llava.model.language_model.lm_head import compute_dtype


class Context(Protocol):
    """The context of a `torch.autograd.Function`."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    shape: torch.Size

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class Rotate(torch.autograd.Function):
    """Rotary position embedding of `x` `(N, heads, head_dim)` (Su et al., arXiv:2104.09864), halves convention."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def normalize(x: Tensor, gain: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`gain * cast(x * scale)`, cast to `dtype`; float32 inside."""
    normalized = (x.float() * scale).to(x.dtype)
    return (gain * normalized if normalized.dtype != gain.dtype else normalized.mul_(gain)).to(dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`(..., 1)` of `x` `(..., D)`, in float32."""
    squares = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_()
    return torch.rsqrt(squares.div_(x.shape[-1]).add_(eps))


def normalize_backward(
    x: Tensor, gain: Tensor, scale: Tensor, grad: Tensor, needs_gain: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `x` and `gain`; `grad` is that of `normalize(x, gain, scale)`."""
    normalized = x.float() * scale
    grad = grad.float()
    grad_gain = torch.linalg.vecdot(grad, normalized, dim=0).to(gain.dtype) if needs_gain else None
    grad = grad * gain.float()
    along = torch.linalg.vecdot(grad, normalized, dim=-1).div_(x.shape[-1]).unsqueeze(-1)
    return grad.addcmul_(normalized, along, value=-1).mul_(scale).to(x.dtype), grad_gain


class _Normalize(torch.autograd.Function):
    """RMSNorm of `x` `(N, D)`. Saves the input and one number per token."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, scale)
        return normalize(x, gain, scale, dtype)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        return *normalize_backward(x, gain, scale, grads[0], ctx.needs_input_grad[1]), None, None


class _NormalizedLinear(torch.autograd.Function):
    """Products of the weights, each `(F, D)`, with the RMSNorm of `x` `(N, D)`: one `(N, F)` each, in `dtype`.

    Saves `x` and one number per token, instead of the normalized tokens and weights in the dtype of autocast.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, scale, *weights)
        normalized = normalize(x, gain, scale, dtype)
        return tuple(normalized @ weight.to(dtype).t() for weight in weights)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale, *weights = ctx.saved_tensors
        return linear_backward(x, gain, scale, weights, grads, ctx.needs_input_grad[1], ctx.needs_input_grad[4:])


def linear_backward(
    x: Tensor,
    gain: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs_gain: bool,
    needs_weights: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, gain, eps, dtype and the weights, from those of the products `(N, F)`."""
    dtype = grads[0].dtype
    grad = grads[0] @ weights[0].to(dtype)
    for other, weight in zip(grads[1:], weights[1:]):
        grad.addmm_(other, weight.to(dtype))
    grad_x, grad_gain = normalize_backward(x, gain, scale, grad, needs_gain)
    grad_weights: list[Tensor | None] = [None] * len(weights)
    if any(needs_weights):
        normalized = normalize(x, gain, scale, dtype)
        for index, (other, weight) in enumerate(zip(grads, weights)):
            if needs_weights[index]:
                grad_weights[index] = (other.t() @ normalized).to(weight.dtype)
    return grad_x, grad_gain, None, None, *grad_weights


class _NormalizedMLP(torch.autograd.Function):
    """`silu(gate) * up` through the down projection (Shazeer, arXiv:2002.05202), of the RMSNorm of `x` `(N, D)`.

    Saves `x`, gate and up `(N, F)`; recomputes what is elementwise.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        scale = inverse_rms(x, eps)
        normalized = normalize(x, gain, scale, dtype)
        gate, up = (normalized @ weight.to(dtype).t() for weight in weights[:2])
        ctx.save_for_backward(x, gain, scale, gate, up, *weights)
        return F.silu(gate).mul_(up) @ weights[2].to(dtype).t()

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale, gate, up, *weights, down = ctx.saved_tensors
        needs = ctx.needs_input_grad
        activated = F.silu(gate)
        grad_down = (grads[0].t() @ (activated * up)).to(down.dtype) if needs[6] else None
        grad = grads[0] @ down.to(gate.dtype)
        inner = torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad)
        return *linear_backward(x, gain, scale, weights, inner, needs[1], needs[4:6]), grad_down


def plain(linear: nn.Module) -> bool:
    """Whether a layer is linear without bias: no adapter, not quantized, not partitioned by ZeRO-3."""
    is_linear = type(linear) is nn.Linear and getattr(linear, "bias", None) is None
    return is_linear and not hasattr(linear.weight, "ds_id")


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced `forward`, which accelerate sets."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


class RMSNorm(modeling_llama.LlamaRMSNorm):
    """RMSNorm with a backward pass that saves less; under autocast it returns the autocast dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training:  # not by grad mode: a checkpointed layer must compute the same in both passes
            return cast("Tensor", super().forward(hidden_states))
        dtype = compute_dtype(hidden_states)
        return cast("Tensor", _Normalize.apply(hidden_states, self.weight, self.variance_epsilon, dtype))


class _Gated(torch.autograd.Function):
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202), any shape; saves both and recomputes the activation."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class LlamaMLP(modeling_llama.LlamaMLP):
    """MLP with a backward pass that saves less."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return cast("Tensor", super().forward(x))
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated = isinstance(self.act_fn, nn.SiLU) and gate.dtype == up.dtype
        return cast("Tensor", self.down_proj(_Gated.apply(gate, up) if gated else self.act_fn(gate) * up))


def normalized_linear(norm: nn.Module, linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """The linear layers of the norm of `x` `(N, D)`: one `(N, F)` each, in training as one function."""
    if fuses(x, norm, linears):
        weights = (linear.weight for linear in linears)
        product = _NormalizedLinear.apply(x, norm.weight, norm.variance_epsilon, compute_dtype(x), *weights)
        return cast("tuple[Tensor, ...]", product)
    normalized = norm(x)
    return tuple(linear(normalized) for linear in linears)


def normalized_mlp(norm: nn.Module, mlp: LlamaMLP, x: Tensor) -> Tensor:
    """The MLP of the norm of `x` `(N, D)`, in training as one function."""
    linears = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if fuses(x, norm, linears) and isinstance(mlp.act_fn, nn.SiLU) and not hooked(mlp):
        weights = (linear.weight for linear in linears)
        return cast("Tensor", _NormalizedMLP.apply(x, norm.weight, norm.variance_epsilon, compute_dtype(x), *weights))
    return cast("Tensor", mlp(norm(x)))


def fuses(x: Tensor, norm: nn.Module, linears: Sequence[nn.Module]) -> bool:
    """Whether norm and linear layers can run as one function, which would also cast weights that the layers refuse."""
    modules: Sequence[nn.Module] = (norm, *linears)
    if not norm.training or type(norm) is not RMSNorm or any(map(hooked, modules)):
        return False
    dtype = compute_dtype(x)
    return all(plain(linear) and compute_dtype(cast("Tensor", linear.weight)) == dtype for linear in linears)
