"""The CLIP tower: the library's `CLIPVisionModel`, run up to the selected layer (spec/model.md §3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.errors import CheckpointError, ConfigError
from llava.model.multimodal_encoder.builder import TowerSpec


def _config(settings: dict[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{key: value for key, value in settings.items() if key != "model_type"})


def _processor(directory: Path | None, size: int | None) -> CLIPImageProcessor:
    """The tower's own `preprocessor_config.json`; CLIP has one resolution, so another `size` is refused."""
    if directory is None or not (directory / "preprocessor_config.json").is_file():
        raise CheckpointError(f"The CLIP tower {directory} lacks preprocessor_config.json; download it again.")
    processor = CLIPImageProcessor.from_pretrained(directory)
    if size is not None and processor.crop_size["height"] != size:
        raise ConfigError(f"{directory} works at {processor.crop_size['height']} px only, not at {size} px.")
    return processor


TOWER = TowerSpec(
    config=_config,
    build=CLIPVisionModel,
    processor=_processor,
    layers="vision_model.encoder.layers.",
    positions="vision_model.embeddings.position_embedding.weight",
    unused=("vision_model.post_layernorm.", "vision_model.embeddings.position_ids", "text_model.", "text_projection.",
            "visual_projection.", "logit_scale"),
)  # fmt: skip
