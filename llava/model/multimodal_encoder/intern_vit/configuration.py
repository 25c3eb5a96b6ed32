"""Configuration of InternViT (spec/model.md §1.1; Chen et al., "InternVL", arXiv:2312.14238)."""

from __future__ import annotations

import os
from typing import Any

from transformers import PretrainedConfig

from llava.errors import ConfigError


class InternVisionConfig(PretrainedConfig):
    """Shape and numerics of one InternViT; the defaults are those of the 6B tower at 224 px.

    Raises `ConfigError` when the heads do not divide the width, or when the file describes another kind of norm
    or of model: its weights would load and compute something else.
    """

    model_type = "intern_vit_6b"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 224,
        qkv_bias: bool = False,
        hidden_size: int = 3200,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        qk_normalization: bool = True,
        num_hidden_layers: int = 48,
        use_flash_attn: bool = True,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        norm_type: str = "rms_norm",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if hidden_size % num_attention_heads:
            raise ConfigError(
                f"InternViT width {hidden_size} is not a multiple of num_attention_heads={num_attention_heads}; "
                "correct one of the two in the tower's config.json."
            )
        if norm_type != "rms_norm":
            raise ConfigError(
                f"This tower uses norm_type={norm_type!r}, but InternViT-6B weights need 'rms_norm'; "
                "use an InternViT-6B tower (InternViT-300M is another architecture)."
            )
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.use_flash_attn = use_flash_attn
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.norm_type = norm_type

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> InternVisionConfig:
        """Read `config.json`; a composite file supplies its `vision_config`. A foreign `model_type` is an error."""
        settings, kwargs = cls.get_config_dict(name, **kwargs)
        settings = settings.get("vision_config", settings)
        found = settings.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(f"{name} holds a {found!r} model, not an InternViT ('{cls.model_type}').")
        config: InternVisionConfig = cls.from_dict(settings, **kwargs)
        return config
