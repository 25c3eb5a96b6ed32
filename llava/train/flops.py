"""Model FLOPs of a training step by component, and the peak FLOP/s of known devices.

Counted as in PaLM (arXiv:2204.02311, appendix B): two FLOPs per weight and token forward, twice that backward where
gradients are needed, causal attention at half its square; recomputation by gradient checkpointing does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from llava.model.multimodal_encoder.tower import VisionTower

SUPERVISED_TEXT: Final = 0.6  # assumed fraction of the text of a conversation
# Dense 16-bit peak in FLOP/s without sparsity, by substring of the device name, from the data sheets.
PEAKS: Final = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "A6000": 155e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
}


def device_peak(name: str) -> float | None:
    """Peak FLOP/s of a device name, or None if it is unknown."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Shape:
    """Dimensions of language model, vision tower and projector that determine compute and memory.

    `tower_layers` counts the layers that run, `tower_positions` the positions of one image with the class token,
    `image_tokens` its positions in the language model.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tower_hidden: int = 0
    tower_intermediate: int = 0
    tower_layers: int = 0
    tower_positions: int = 0
    image_tokens: int = 0
    projector_layers: int = 2

    @property
    def key_value(self) -> int:
        return self.hidden // self.heads * self.key_value_heads

    @property
    def layer_weights(self) -> int:
        return 2 * self.hidden * (self.hidden + self.key_value) + 3 * self.hidden * self.intermediate

    @property
    def language_weights(self) -> int:
        """Parameters of the language model with embedding, head and norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden + norms

    @property
    def projector_weights(self) -> int:
        if not self.tower_hidden:
            return 0
        first = self.tower_hidden * self.hidden + self.hidden
        return first + (self.projector_layers - 1) * (self.hidden * self.hidden + self.hidden)

    @property
    def tower_weights(self) -> int:
        layer = 4 * self.tower_hidden**2 + 2 * self.tower_hidden * self.tower_intermediate
        return self.tower_layers * layer + self.tower_hidden * (self.tower_positions + 3 * 14 * 14)


def shape_of(config: PretrainedConfig, tower: VisionTower | None = None) -> Shape:
    """Shape of a chat model from its configuration and vision tower."""
    language = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "vocabulary": config.vocab_size,
    }
    shape = Shape(**language)
    return shape if tower is None else with_tower(shape, config, tower)


def with_tower(shape: Shape, config: PretrainedConfig | SimpleNamespace, tower: VisionTower) -> Shape:
    """`shape` with a vision tower and the projector of `config`."""
    from llava.model.multimodal_projector.builder import projected_tokens

    vision = tower.spec.vision(tower.config)
    kind = str(getattr(config, "mm_projector_type", "linear"))
    return replace(
        shape,
        tower_hidden=tower.image_hidden_size,
        tower_intermediate=getattr(vision, "intermediate_size", None) or 4 * vision.hidden_size,
        tower_layers=tower.depth,
        tower_positions=tower.num_patches + tower.spec.class_token + tower.spec.registers,
        image_tokens=projected_tokens(config, *tower.feature_shapes),
        projector_layers=int(kind[3]) if kind.startswith("mlp") and kind[3].isdigit() else 1,
    )


@dataclass(frozen=True)
class Trainable:
    """Components that are trained; LoRA weights in the language model and in the tower are counted."""

    language: bool = True
    projector: bool = True
    tower: bool = False
    adapters: int = 0
    tower_adapters: int = 0


def step_flops(
    shape: Shape, trainable: Trainable, *, tokens: float, length: float, images: float, supervised: float
) -> float:
    """Model FLOPs of forward and backward over `tokens` positions (images expanded) in sequences of `length`.

    Logits are computed at the `supervised` positions.
    """
    layer = 2 * shape.layer_weights + 2 * shape.hidden * length  # per token
    language = shape.layers * layer * tokens + 2 * shape.vocabulary * shape.hidden * supervised
    language *= 3 if trainable.language and not trainable.adapters else 2
    language += 6 * trainable.adapters * tokens
    positions = shape.tower_positions
    block = 2 * (4 * shape.tower_hidden**2 + 2 * shape.tower_hidden * shape.tower_intermediate)
    tower = images * positions * shape.tower_layers * (block + 4 * shape.tower_hidden * positions)
    projector = 2 * shape.projector_weights * images * shape.image_tokens
    tower *= 3 if trainable.tower else 2 if trainable.tower_adapters else 1
    tower += 6 * trainable.tower_adapters * images * positions
    return language + tower + projector * 3


def row_flops(
    shape: Shape, trainable: Trainable, positions: npt.NDArray[np.int64], images: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Model FLOPs of each row of a step, from its `positions` (images expanded) and `images`, both (rows,).

    `SUPERVISED_TEXT` of the text is taken to be supervised.
    """

    def unit(**counts: float) -> float:
        return step_flops(shape, trainable, **{"tokens": 0, "length": 0, "images": 0, "supervised": 0, **counts})

    linear = unit(tokens=1)
    text = positions - images * shape.image_tokens
    decoder = positions * (linear + (unit(tokens=1, length=1) - linear) * positions)
    vision, head = unit(images=1) * images, unit(supervised=SUPERVISED_TEXT) * text
    return np.asarray(decoder + vision + head, np.float64)
