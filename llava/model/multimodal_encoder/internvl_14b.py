"""InternVL-14B: InternViT and QLLaMA, whose 96 queries attend to each other and, in every second layer, to the image.

The vocabulary matrices and contrastive heads of the published checkpoint (arXiv:2312.14238) are not loaded.
Shapes: B images, Q queries, N image tokens with the class token, H QLLaMA width, C tower width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llava.errors import ConfigError
from llava.model.config import read_settings
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel, intern_vit_processor
from llava.model.registry import TowerSpec


@dataclass
class InternVLFeatures:
    """`last_hidden_state` `(B, N, C)`: tower tokens at the selected layer; `query_features` `(B, Q, H)`."""

    last_hidden_state: Tensor
    query_features: Tensor


class QLlamaProjections(nn.Module):
    """Attention projections without bias; `source` is the input width of keys and values."""

    def __init__(self, config: LlamaConfig, source: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source, width, bias=False)
        self.v_proj = nn.Linear(source, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def merge(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.o_proj(rearrange(x, "b h n d -> b n (h d)")))


class QLlamaSelfAttention(QLlamaProjections):
    """Bidirectional attention among the queries, with rotary positions 0 to Q - 1."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(
            config.hidden_size // config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            base=config.rope_theta,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        cos, sin = self.rotary_emb(v, seq_len=x.shape[1])
        q, k = apply_rotary_pos_emb(q, k, cos, sin, positions)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class QLlamaCrossAttention(QLlamaProjections):
    """Attention of the queries to the image, with one norm for each, without rotary embedding and mask."""

    def __init__(self, config: LlamaConfig, source: int) -> None:
        super().__init__(config, source)
        self.norm1 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm2 = LlamaRMSNorm(source, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x, image = self.norm1(x), self.norm2(image)
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(image)), self.split(self.v_proj(image))
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class QLlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, source: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attn = QLlamaSelfAttention(config)
        self.cross_attn = QLlamaCrossAttention(config, source) if cross else None
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, image)
        return x + cast("Tensor", self.mlp(self.post_attention_layernorm(x)))


class QLlamaCore(nn.Module):
    """Decoder layers; layer `i` has cross attention if `i % frequency == 0`."""

    def __init__(self, config: LlamaConfig, source: int, frequency: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            QLlamaLayer(config, source, cross=i % frequency == 0) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        for layer in self.layers:
            queries = layer(queries, image)
        return cast("Tensor", self.norm(queries))


class QLlama(nn.Module):
    """Wrapper with the core under `model`, as in the published keys."""

    def __init__(self, config: LlamaConfig, source: int, frequency: int) -> None:
        super().__init__()
        self.model = QLlamaCore(config, source, frequency)


class InternVLTower(nn.Module):
    """Pixels `(B, 3, S, S)` to `InternVLFeatures`; the queries attend to the last layer, so all layers run."""

    def __init__(self, config: InternVLConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.depth = depth
        vision: InternVisionConfig = config.vision_config
        self.vision_model = InternVisionModel(vision)
        self.qllama = QLlama(config.qllama_config, vision.hidden_size, config.cross_attention_frequency)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, config.qllama_config.hidden_size))

    def forward(self, pixel_values: Tensor) -> InternVLFeatures:
        encoded = self.vision_model(pixel_values, output_hidden_states=True)
        queries = self.query_tokens.expand(pixel_values.shape[0], -1, -1)
        read = self.qllama.model(queries, encoded.last_hidden_state)
        return InternVLFeatures(encoded.hidden_states[self.depth], read)


class InternVLConfig(PretrainedConfig):
    """Composite configuration; `hidden_size` is QLLaMA's. Raises `ConfigError` for unmerged LoRA layers."""

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
            raise ConfigError("This InternVL tower has unmerged LoRA layers; merge them and set their ranks to 0.")
        vision = {key: value for key, value in (vision_config or {}).items() if key != "model_type"}
        self.vision_config = InternVisionConfig(**vision)
        self.qllama_config = LlamaConfig(**read_settings(qllama_config or {}, LlamaConfig, "the InternVL tower"))
        if self.qllama_config.rope_scaling is not None or self.qllama_config.attention_bias:
            raise ConfigError("This InternVL tower sets rope_scaling or attention_bias in qllama_config; delete them.")
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
