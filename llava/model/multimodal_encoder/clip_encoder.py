"""CLIP and EVA-CLIP vision transformers; both have `model_type` `clip`, and their settings tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPMLP

from llava.errors import CheckpointError, ConfigError
from llava.model.multimodal_encoder.tower import TowerArguments, VisionTower
from llava.model.registry import TowerSpec

EVA_SETTINGS = ("q_bias", "k_bias", "v_bias", "post_layernorm")


class CLIPVisionTower(VisionTower):
    """`VisionTower` with the published signature; it loads its weights at once unless `delay_load` is set."""

    def __init__(self, vision_tower: str, args: TowerArguments, delay_load: bool = False) -> None:
        super().__init__(vision_tower, args)
        if not delay_load:
            self.load_model()


@dataclass(frozen=True)
class Variant:
    """Differences between the CLIP family's layers; the defaults are OpenAI's CLIP.

    `patch_bias` is of the patch convolution, `pre_norm` a norm before the first layer, and with `norm_after` the norms
    of a layer follow its sub-blocks (before the residual sum).
    """

    patch_bias: bool = False
    pre_norm: bool = True
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    norm_after: bool = False


class ClipEmbeddings(nn.Module):
    """Class token, patches and positions: `(B, 3, S, S)` to `(B, 1 + N, C)`."""

    def __init__(self, config: CLIPVisionConfig, variant: Variant) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=variant.patch_bias)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixel_values), "b c h w -> b (h w) c")
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        if patches.shape[1] + 1 != self.position_embedding.num_embeddings:
            raise ValueError(
                f"This tower has positions for {self.position_embedding.num_embeddings - 1} patches, but the image "
                f"gives {patches.shape[1]}; CLIP works at its own resolution only."
            )
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class ClipAttention(nn.Module):
    def __init__(self, config: CLIPVisionConfig, variant: Variant) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=variant.q_bias)
        self.k_proj = nn.Linear(width, width, bias=variant.k_bias)
        self.v_proj = nn.Linear(width, width, bias=variant.v_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(projection(x), "b n (h d) -> b h n d", h=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return cast("Tensor", self.out_proj(rearrange(out, "b h n d -> b n (h d)")))


class CLIPEncoderLayer(nn.Module):
    """Encoder layer, named as in transformers for device maps and FSDP."""

    def __init__(self, config: CLIPVisionConfig, variant: Variant) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config, variant)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_after = variant.norm_after

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_after:
            x = x + self.layer_norm1(self.self_attn(x))
            return x + cast("Tensor", self.layer_norm2(self.mlp(x)))
        x = x + self.self_attn(self.layer_norm1(x))
        return x + cast("Tensor", self.mlp(self.layer_norm2(x)))


class ClipEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig, variant: Variant) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config, variant) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.run: Callable[[Tensor], Tensor] | None = None  # replaces the layers if set

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(x)
        checkpoint = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpoint else layer(x)
        return x


class ClipVisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig, variant: Variant) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config, variant)
        if variant.pre_norm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = ClipEncoder(config, variant)


class ClipVisionModel(nn.Module):
    """CLIP vision model without the final norm: `(B, 3, S, S)` to `last_hidden_state` `(B, 1 + N, C)`."""

    def __init__(self, config: CLIPVisionConfig, variant: Variant) -> None:
        super().__init__()
        self.config = config
        self.vision_model = ClipVisionTransformer(config, variant)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Encode pixels; `output_hidden_states` is accepted for compatibility and ignored."""
        model = self.vision_model
        x = model.embeddings(pixel_values)
        if hasattr(model, "pre_layrnorm"):
            x = model.pre_layrnorm(x)
        return BaseModelOutput(last_hidden_state=model.encoder(x))


def is_eva(settings: dict[str, Any]) -> bool:
    """Whether a `clip` configuration is EVA-CLIP's, which has settings that CLIP's has not."""
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
    """The tower's `preprocessor_config.json`; CLIP has one resolution, so another `size` raises `ConfigError`."""
    if directory is None or not (directory / "preprocessor_config.json").is_file():
        raise CheckpointError(f"The CLIP tower {directory} has no preprocessor_config.json; download it again.")
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
    settings=EVA_SETTINGS,
)  # fmt: skip
