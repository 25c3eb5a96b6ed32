"""InternVL-14B's configuration (spec/model.md §5.1) and its entry in the tower registry."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from llava.errors import ConfigError
from llava.model.multimodal_encoder.builder import TowerSpec
from llava.model.multimodal_encoder.intern_vit.configuration import InternVisionConfig
from llava.model.multimodal_encoder.intern_vit.tower import intern_vit_processor
from llava.model.multimodal_encoder.internvl_14b.modeling import InternVLTower


class InternVLConfig(PretrainedConfig):
    """The composite configuration; `hidden_size` is QLLaMA's. Backbone LoRA ranks must be 0 (merge them first)."""

    model_type = "internvl"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        qllama_config: dict[str, Any] | None = None,
        num_query_token: int = 96,
        cross_attention_frequency: int = 2,
        use_backbone_lora: int = 0,
        use_qllama_lora: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if use_backbone_lora or use_qllama_lora:
            raise ConfigError("This InternVL tower has unmerged LoRA layers; merge them and set the ranks to 0.")
        vision = {key: value for key, value in (vision_config or {}).items() if key != "model_type"}
        self.vision_config = InternVisionConfig(**vision)
        self.qllama_config = LlamaConfig(**(qllama_config or {}))
        self.num_query_token = num_query_token
        self.cross_attention_frequency = cross_attention_frequency
        self.hidden_size = self.qllama_config.hidden_size


def _config(settings: dict[str, Any]) -> InternVLConfig:
    return InternVLConfig(**{key: value for key, value in settings.items() if key != "model_type"})


TOWER = TowerSpec(
    config=_config,
    build=InternVLTower,
    processor=lambda directory, size: intern_vit_processor(size or 336),
    layers=None,
    positions="vision_model.embeddings.position_embedding",
    unused=("qllama.model.embed_tokens.", "qllama.lm_head.", "text_projection", "logit_scale", "clip_projector",
            "itm_head."),
    vision=lambda config: config.vision_config,
    queries=lambda config: config.num_query_token,
)  # fmt: skip
