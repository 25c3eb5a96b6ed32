"""Linear layers of one input as one product: `y = x W^T + b`, with the weights of several layers under each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.placement import prefers_matrix_vector


class Product:
    """The outputs of `modules` side by side, (N, in) to (N, sum of outs).

    Plain linear layers are fused: their parameters become views of one tensor, so that nothing is stored twice and the
    library's forward (beam search) sees the same weights. `state_dict` gives separate tensors, so that saving works.
    Others (4 and 8 bit) are called one by one.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        linear = [module for module in modules if type(module) is nn.Linear]
        biased = [module.bias is not None for module in linear]
        if len(linear) != len(modules) or any(biased) != all(biased):
            return
        self.weight = fuse(linear, "weight")
        self.bias = fuse(linear, "bias") if all(biased) else None
        self.vector = prefers_matrix_vector(self.weight.device, self.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            parts = [module(x) for module in self.modules]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.vector and len(x) == 1:
            out = torch.mv(self.weight, x[0])
            return (out if self.bias is None else out + self.bias).unsqueeze(0)
        return F.linear(x, self.weight, self.bias)


def fuse(modules: Sequence[nn.Linear], name: str) -> Tensor:
    """One tensor of a parameter of all modules, under each other; the parameters become views of it, once for all."""
    parameters = [module.get_parameter(name) for module in modules]
    first = parameters[0].data
    at = first.storage_offset()
    together = True
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        together = together and same and parameter.is_contiguous() and bool(parameter.storage_offset() == at)
        at += parameter.numel()
    if together:
        rows = sum(map(len, parameters))
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([parameter.data for parameter in parameters])
    views = torch.split(whole, [len(parameter) for parameter in parameters])
    for module, parameter, view in zip(modules, parameters, views, strict=True):
        parameter.data = view
        module._register_state_dict_hook(_separate)  # type: ignore[no-untyped-call]
    return whole


def _separate(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Writers of checkpoints refuse, or drop, tensors that share storage."""
    for name in ("weight", "bias"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = state[f"{prefix}{name}"].clone()
