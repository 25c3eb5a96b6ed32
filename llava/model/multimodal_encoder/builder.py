"""Vision tower of a chat model's configuration."""

from __future__ import annotations

from pathlib import Path

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.tower import TowerArguments, VisionTower


def build_vision_tower(
    config: TowerArguments, checkpoint_dir: Path | None = None, *, delay_load: bool = False
) -> VisionTower:
    """The tower named by `mm_vision_tower`, else `vision_tower`, of a configuration or of training arguments.

    `checkpoint_dir` is the chat checkpoint. Unless `delay_load` is set, the weights are loaded.
    """
    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not name:
        raise CheckpointError("The configuration has no mm_vision_tower; pass --vision_tower.")
    tower = VisionTower(str(name), config, checkpoint_dir=checkpoint_dir)
    if not delay_load:
        tower.load_model()
    return tower
