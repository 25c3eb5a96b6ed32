"""A fake GPU: "cuda" tensors with shapes but no values, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llava.engine import attention, layers

MEMORY: Final = 141 * 10**9
ALIGNMENT: Final = 16  # elements between the rows of a mask that the memory-efficient kernel reads


def fake_card(patch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Patch torch to describe one H200, and return the mode under which tensors can be created on it.

    Whatever needs values (`.item()`, `.tolist()`, a boolean index) fails.
    """
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    described = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H200",
        "mem_get_info": (MEMORY, MEMORY),
        "synchronize": None,
    }
    for name, value in described.items():
        patch.setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
    patch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
    patch.setattr(FakeTensorMode, "avoid_device_init", True, raising=False)
    patch.setattr(Tensor, "pin_memory", lambda self, device=None: self)
    patch.setattr(F, "scaled_dot_product_attention", fused_attention)
    patch.setattr(attention, "_cuda_efficient", efficient_attention)
    patch.setattr(layers, "fuse_weights", stacked)
    return FakeTensorMode()


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """The kernels that `scaled_dot_product_attention` selects on a recent GPU in 16-bit, instead of "math"."""
    if attn_mask is None:
        kernel, bias = torch.ops.aten._scaled_dot_product_flash_attention, ()
    else:
        width = key.shape[-2]
        if any(stride % ALIGNMENT for stride in attn_mask.stride()[:-1]):  # torch then copies the mask at every call
            attn_mask = F.pad(attn_mask, (0, -width % ALIGNMENT))[..., :width]
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = (attn_mask.expand(*query.shape[:-1], width), False)
    out: Tensor = kernel(query, key, value, *bias, dropout_p, is_causal, **options)[0]
    return out


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *args: Any, **options: Any
) -> Any:
    """The operator, with the alignment check of its CUDA kernel."""
    aligned = bias is None or not any(stride % ALIGNMENT for stride in bias.stride()[:-1])
    assert aligned, f"attn_bias is not correctly aligned: strides {bias.stride()}"
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, *args, **options)


def stacked(modules: Sequence[nn.Linear], name: str) -> Tensor:
    """Replaces `layers.fuse_weights`, which compares memory addresses."""
    return torch.cat([module.get_parameter(name).data for module in modules])
