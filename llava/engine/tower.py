"""Layers of a CLIP tower in bfloat16 on the CPU, with fewer passes over memory than in PyTorch.

Queries, keys and values are one matrix product, and activations and residual sums are part of the products before them
(`llava.engine.native.packed.TileLinear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from llava.engine.layers import FusedLinear
from llava.engine.native.attention import KVBlock, PromptAttention
from llava.engine.native.packed import GELU, QUICK_GELU
from llava.model.multimodal_encoder.clip_encoder import CLIPEncoderLayer, ClipVisionModel


class TowerLayer:
    """One layer of a CLIP tower whose linear layers run on tiles."""

    def __init__(self, layer: CLIPEncoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm, self.heads = layer.layer_norm1, layer.layer_norm2, attention.num_heads
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.fc1, self.fc2 = (FusedLinear(one) for one in (attention.out_proj, mlp.fc1, mlp.fc2))
        self.activation = QUICK_GELU if isinstance(mlp.activation_fn, QuickGELUActivation) else GELU

    @staticmethod
    def supports(layer: nn.Module) -> TypeGuard[CLIPEncoderLayer]:
        if not isinstance(layer, CLIPEncoderLayer) or layer.norm_after:
            return False
        act = layer.mlp.activation_fn
        return isinstance(act, QuickGELUActivation) or (type(act).__name__ == "GELUActivation" and act.act is F.gelu)

    @property
    def on_tiles(self) -> bool:
        return all(linear.tiles is not None for linear in (self.qkv, self.out, self.fc1, self.fc2))

    def __call__(self, batch: Tensor) -> Tensor:
        """(K, N, C) to (K, N, C)."""
        (count, tokens, width), x = batch.shape, batch.flatten(0, 1)
        qkv = self.qkv(self.norm(x))
        query, keys, _ = qkv.view(len(x), 3, self.heads, -1).unbind(1)
        stride, size = qkv.stride(0), width // self.heads
        start, step = keys.data_ptr(), tokens * stride * qkv.itemsize
        blocks = [[KVBlock(start + image * step, tokens, 0, width, size)] for image in range(count)]
        attention = PromptAttention([tokens] * count, blocks)
        x = self.out(attention(query, self.heads, stride, causal=False), residual=x)
        return self.fc2(self.fc1(self.mlp_norm(x), activation=self.activation), residual=x).view(batch.shape)


class TowerRunner:
    """All layers of a CLIP tower."""

    def __init__(self, tower: ClipVisionModel, layers: list[TowerLayer]) -> None:
        self.encoder, self.layers = tower.vision_model.encoder, layers

    @classmethod
    def build(cls, model: Any) -> TowerRunner | None:
        """The runner of the tower of a chat model; None if it has none that runs on tiles."""
        find = getattr(model, "get_vision_tower", None)
        tower = getattr(None if find is None else find(), "vision_tower", None)
        if not isinstance(tower, ClipVisionModel):
            return None
        found = tower.vision_model.encoder.layers
        parameter = next(tower.parameters())
        size = tower.config.hidden_size // tower.config.num_attention_heads
        if not PromptAttention.supports(parameter.dtype, parameter.device, size):
            return None
        layers = [TowerLayer(layer) for layer in found if TowerLayer.supports(layer)]
        whole = len(layers) == len(found) and all(layer.on_tiles for layer in layers)
        return cls(tower, layers) if whole else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the tower's encoder by `run` meanwhile."""
        self.encoder.run = self.run
        try:
            yield
        finally:
            self.encoder.run = None

    def run(self, x: Tensor) -> Tensor:
        """(K, N, C) to (K, N, C)."""
        for layer in self.layers:
            x = layer(x)
        return x
