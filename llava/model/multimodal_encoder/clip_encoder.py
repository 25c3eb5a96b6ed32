"""CLIP and EVA-CLIP in the tower registry; both call themselves `clip`, so their settings tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, CLIPVisionConfig

from llava.errors import CheckpointError, ConfigError
from llava.model.multimodal_encoder.builder import TowerSpec
from llava.model.multimodal_encoder.clip_vit import ClipVisionModel, Variant

EVA_SETTINGS = ("q_bias", "k_bias", "v_bias", "post_layernorm")


def is_eva(settings: dict[str, Any]) -> bool:
    """Whether a `clip` configuration is EVA-CLIP's: it has switches that CLIP's lacks (§4)."""
    return any(key in settings for key in EVA_SETTINGS)


def _config(settings: dict[str, Any]) -> CLIPVisionConfig:
    defaults = {"hidden_act": "gelu", "layer_norm_eps": 1e-5} if is_eva(settings) else {}
    return CLIPVisionConfig(**{**defaults, **{key: v for key, v in settings.items() if key != "model_type"}})


def _build(config: CLIPVisionConfig, depth: int) -> ClipVisionModel:
    variant = Variant()
    if is_eva(config.to_dict()):
        biases = {name: bool(getattr(config, name, True)) for name in EVA_SETTINGS[:3]}
        after = bool(getattr(config, "post_layernorm", False))
        variant = Variant(patch_bias=True, pre_norm=False, norm_after=after, **biases)
    config.num_hidden_layers = depth
    return ClipVisionModel(config, variant)


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
    build=_build,
    processor=_processor,
    layers="vision_model.encoder.layers.",
    positions="vision_model.embeddings.position_embedding.weight",
    unused=("vision_model.post_layernorm.", "vision_model.embeddings.position_ids", "text_model.", "text_projection.",
            "visual_projection.", "logit_scale"),
)  # fmt: skip
