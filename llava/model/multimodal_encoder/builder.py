"""Building the vision tower of a chat model's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.tower import VisionTower


def build_vision_tower(config: Any, checkpoint_dir: Path | None = None, *, delay_load: bool = False) -> VisionTower:
    """The tower wrapper for a model configuration or the model arguments (`mm_vision_tower`, else `vision_tower`)."""
    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not name:
        raise CheckpointError("No vision tower is named: the configuration lacks mm_vision_tower.")
    tower = VisionTower(str(name), config, checkpoint_dir=checkpoint_dir)
    if not delay_load:
        tower.load_model()
    return tower
