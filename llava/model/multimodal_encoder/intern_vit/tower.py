"""InternViT's entry in the tower registry, with the image processor of spec/model.md §2.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor

from llava.model.multimodal_encoder.builder import TowerSpec
from llava.model.multimodal_encoder.intern_vit.configuration import InternVisionConfig
from llava.model.multimodal_encoder.intern_vit.modeling import InternVisionModel

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def _config(settings: dict[str, Any]) -> InternVisionConfig:
    return InternVisionConfig(**{key: value for key, value in settings.items() if key != "model_type"})


def _build(config: InternVisionConfig, depth: int) -> InternVisionModel:
    config.num_hidden_layers = depth
    return InternVisionModel(config)


def intern_vit_processor(size: int) -> CLIPImageProcessor:
    """Resize the short edge to `size` (bicubic), crop the centre, ImageNet statistics; float32 `(3, size, size)`."""
    return CLIPImageProcessor(size=size, crop_size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def _processor(directory: Path | None, size: int | None) -> CLIPImageProcessor:
    """`size` pixels; when not given, 448 if the directory's own name says so, else 336 (M1)."""
    return intern_vit_processor(size or (448 if directory is not None and "448" in directory.name else 336))


TOWER = TowerSpec(
    config=_config,
    build=_build,
    processor=_processor,
    layers="encoder.layers.",
    positions="embeddings.position_embedding",
)
