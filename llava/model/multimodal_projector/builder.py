"""Projectors from tower features to word embeddings, by `mm_projector_type`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import ConfigError
from llava.model.registry import projector_factory


class IdentityMap(nn.Module):
    """Pass features through; the tower must have the language model's width."""

    @classmethod
    def from_config(cls, config: Any) -> IdentityMap:
        if config.mm_hidden_size != config.hidden_size:
            raise ConfigError(
                f"mm_projector_type 'identity' needs equal widths; the tower's is {config.mm_hidden_size}, the "
                f"language model's {config.hidden_size}. Use another, such as mlp2x_gelu."
            )
        return cls()

    def forward(self, features: Tensor, *args: object, **kwargs: object) -> Tensor:
        return features

    @property
    def config(self) -> dict[str, str]:
        return {"mm_projector_type": "identity"}


class TwoMLPProjector(nn.Module):
    """Projector of InternVL-14B: patch features `(K, n, image_size)` and query features `(K, q, query_size)`."""

    def __init__(self, image_size: int, query_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp1 = gelu_mlp(image_size, hidden_size, 2)
        self.mlp2 = gelu_mlp(query_size, hidden_size, 2)

    @classmethod
    def from_config(cls, config: Any) -> TwoMLPProjector:
        return cls(getattr(config, "mm_image_hidden_size", None) or 3200, config.mm_hidden_size, config.hidden_size)

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


def linear(config: Any) -> nn.Module:
    return nn.Linear(config.mm_hidden_size, config.hidden_size)


def mlp_gelu(config: Any) -> nn.Module:
    kind = config.mm_projector_type
    depth = int(kind.removeprefix("mlp").partition("x")[0])
    return gelu_mlp(config.mm_hidden_size, config.hidden_size, depth, layer_norm=kind.endswith("_ln"))


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: object) -> nn.Module:
    """The projector of a configuration: `mm_projector_type`, `mm_hidden_size` (in) and `hidden_size` (out).

    `delay_load` and further arguments are accepted for compatibility and ignored.
    """
    return projector_factory(str(getattr(config, "mm_projector_type", None) or "linear"))(config)


def projected_tokens(config: Any, *features: tuple[int, int]) -> int:
    """The number of embeddings the configured projector makes of one image.

    `features` are (tokens, width) of the tower's features, one pair or two. The projector runs on the meta device:
    shapes only, without weights. Raises `ConfigError` when it cannot.
    """
    kind = getattr(config, "mm_projector_type", None)
    try:
        with torch.device("meta"), torch.no_grad():
            inputs = tuple(torch.empty(1, tokens, width) for tokens, width in features)
            projected = build_vision_projector(config).eval()(inputs if len(inputs) > 1 else inputs[0])
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"The mm_projector_type {kind!r} cannot project features of shape {features} on the meta device "
            f"({error}); its forward must not read values of tensors."
        ) from error
    return int(projected.shape[1])
