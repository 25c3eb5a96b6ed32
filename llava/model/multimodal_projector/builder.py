"""Projectors from tower features to word embeddings, by `mm_projector_type` (spec/model.md §6)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import ConfigError

TYPES = "linear, mlpNx_gelu, mlpNx_gelu_ln, identity, two_mlp"


class IdentityProjector(nn.Module):
    """Features pass through; the tower must have the language model's width."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class TwoMLPProjector(nn.Module):
    """For InternVL-14B: patch features `(K, n, image_size)` and query features `(K, q, query_size)`, queries first."""

    def __init__(self, image_size: int, query_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp1 = gelu_mlp(image_size, hidden_size, 2)
        self.mlp2 = gelu_mlp(query_size, hidden_size, 2)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        image, query = features
        return torch.cat([self.mlp2(query), self.mlp1(image)], dim=1)  # (K, q + n, D)


def gelu_mlp(width: int, hidden_size: int, depth: int, *, layer_norm: bool = False) -> nn.Sequential:
    """`[LayerNorm,] Linear, (GELU, Linear) * (depth - 1)`."""
    layers: list[nn.Module] = [nn.LayerNorm(width)] if layer_norm else []
    layers.append(nn.Linear(width, hidden_size))
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


def build_vision_projector(config: Any) -> nn.Module:
    """The projector of a configuration: `mm_projector_type`, `mm_hidden_size` (in) and `hidden_size` (out)."""
    kind = getattr(config, "mm_projector_type", None) or "linear"
    width, hidden_size = config.mm_hidden_size, config.hidden_size
    if kind == "linear":
        return nn.Linear(width, hidden_size)
    if kind == "identity":
        if width != hidden_size:
            raise ConfigError(
                f"mm_projector_type 'identity' joins equal widths; the tower's is {width}, the language model's "
                f"{hidden_size}. Use another, such as mlp2x_gelu."
            )
        return IdentityProjector()
    if kind == "two_mlp":
        image_width = getattr(config, "mm_image_hidden_size", None) or 3200
        return TwoMLPProjector(image_width, width, hidden_size)
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu(_ln)?", str(kind))
    if match is None:
        raise ConfigError(f"Unknown mm_projector_type {kind!r}; use one of {TYPES}.")
    return gelu_mlp(width, hidden_size, int(match.group(1)), layer_norm=match.group(2) is not None)
