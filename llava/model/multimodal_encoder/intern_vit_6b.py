"""InternViT (Chen et al., arXiv:2312.14238): pre-norm, layer scale, RMSNorm of queries and keys over the full width.

Shapes: B images, N tokens (class token first), C width.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPMLP

from llava.errors import ConfigError
from llava.model.registry import TowerSpec
from llava.model.zero import is_partitioned
from llava.placement import runs_fused_rms_norm


class InternVisionConfig(PretrainedConfig):
    """Configuration of an InternViT; the defaults are InternViT-6B at 224 px.

    Raises `ConfigError` if the heads do not divide the width, or for another norm or model type.
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
        """Read `config.json`, or the `vision_config` in it; raises `ConfigError` for another `model_type`."""
        settings, kwargs = cls.get_config_dict(name, **kwargs)
        settings = settings.get("vision_config", settings)
        found = settings.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(f"{name} holds a {found!r} model, not an InternViT ('{cls.model_type}').")
        config: InternVisionConfig = cls.from_dict(settings, **kwargs)
        return config


class InternRMSNorm(nn.Module):
    """`weight * cast(x / rms(x))`, cast to the input dtype before the product.

    On CUDA torch's fused kernel casts last: one launch instead of six, and a smaller error.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if runs_fused_rms_norm(x, self.weight):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth per sample, kept branches scaled by 1/keep (Huang et al., arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * (x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep) / keep)


class InternVisionEmbeddings(nn.Module):
    """Patches, class token and a position table that is resampled to the input's grid."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        grid = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, grid * grid + 1, width))
        self._resampled: tuple[tuple[object, ...], Tensor, Tensor] | None = None  # key, its table, the result

    def positions(self, height: int, width: int) -> Tensor:
        """The table for a grid of `height` x `width` patches: `(1, 1 + height*width, C)`, in the table's dtype.

        That of a frozen table is computed once.
        """
        table = self.position_embedding
        if table.requires_grad or table.is_inference() or is_partitioned(table):  # changes without notice
            return resample_positions(table, height, width)
        key = (height, width, table._version, table.untyped_storage()._cdata, table.dtype)
        if self._resampled is None or self._resampled[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a result that training can use too
                # The reference to the table keeps the address of its storage from being reused.
                self._resampled = key, table.detach(), resample_positions(table, height, width)
        return self._resampled[2]

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 4:
            raise ValueError(f"InternViT expects pixel_values of shape (B, 3, H, W), got {tuple(pixel_values.shape)}.")
        patches = self.patch_embedding(pixel_values)  # (B, C, H, W)
        height, width = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)  # (B, H*W, C)
        cls = self.class_embedding.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([cls.to(patches.dtype), patches], dim=1)  # (B, N, C)
        return tokens + self.positions(height, width).to(patches.dtype)


def resample_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Resample a position table `(1, 1 + G*G, C)` to `(1, 1 + height*width, C)`, bicubic; the class row is kept.

    The source grid is taken from the size of the table.
    """
    rows = table.shape[1]
    grid = math.isqrt(rows - 1)
    if grid * grid != rows - 1:
        raise ValueError(f"A position table must be one class row and a square grid, got {rows} rows.")
    if (height, width) == (grid, grid):
        return table
    patches = rearrange(table[:, 1:].float(), "1 (h w) c -> 1 c h w", h=grid)
    needs_grad = torch.is_grad_enabled() and table.requires_grad
    if needs_grad and (table.device.type != "cpu" or torch.are_deterministic_algorithms_enabled()):
        # The backward pass of bicubic interpolation has no deterministic implementation on CUDA; a matmul does.
        with torch.autocast(table.device.type, enabled=False):
            rows_weight = bicubic_weight(grid, height).to(table.device, non_blocking=table.is_cuda)
            columns_weight = bicubic_weight(grid, width).to(table.device, non_blocking=table.is_cuda)
            patches = rows_weight @ patches @ columns_weight.T
    else:
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(patches, "1 c h w -> 1 (h w) c").to(table.dtype)], dim=1)


@functools.lru_cache(maxsize=32)
def bicubic_weight(size: int, target: int) -> Tensor:
    """The matrix `(target, size)` that resamples `size` points to `target`, as bicubic `F.interpolate` does."""
    points = torch.eye(size, device="cpu").view(1, size, size, 1)
    with torch.no_grad():
        return F.interpolate(points, size=(target, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T.contiguous()


class InternAttention(nn.Module):
    """Bidirectional attention; Q and K are normalised over the full width, before they are split into heads."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.dropout)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = InternRMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = InternRMSNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, C)
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return cast("Tensor", self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)"))))


class InternVisionEncoderLayer(nn.Module):
    """`x + ls1 * attn(norm1(x))`, then `x + ls2 * mlp(norm2(x))`."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = InternAttention(config)
        self.mlp = CLIPMLP(config)
        self.norm1 = InternRMSNorm(width, eps=config.layer_norm_eps)
        self.norm2 = InternRMSNorm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)) * self.ls1)
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)) * self.ls2)
        return out


class InternVisionEncoder(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, rate) for rate in rates)
        self.gradient_checkpointing = False

    def forward(self, inputs_embeds: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        x = inputs_embeds
        states: tuple[Tensor, ...] | None = (x,) if output_hidden_states else None
        checkpoint = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpoint else layer(x)
            if states is not None:
                states += (x,)
        return BaseModelOutput(last_hidden_state=x, hidden_states=states)


class InternVisionModel(PreTrainedModel):
    """InternViT without a final norm; `pooler_output` is the class token of `last_hidden_state`."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["InternVisionEncoderLayer"]

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep PyTorch's initialisation; `initializer_range` is unused."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """Resample the position table from `old_size` to `new_size` pixels, and update the configuration."""
        rows, expected = self.embeddings.position_embedding.shape[1], (old_size // patch_size) ** 2 + 1
        if rows != expected:
            raise ValueError(f"The position table of {old_size} px must have {expected} rows, got {rows}.")
        grid = new_size // patch_size
        table = resample_positions(self.embeddings.position_embedding.detach(), grid, grid)
        self.embeddings.position_embedding = nn.Parameter(table)
        self.config.image_size = new_size

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPooling | tuple[object, ...]:
        """Encode `pixel_values` `(B, 3, H, W)`, or embedded tokens `pixel_embeds` `(B, N, C)`.

        `hidden_states` has one entry per layer, after the output of the embeddings.
        """
        if pixel_embeds is None:
            if pixel_values is None:
                raise ValueError("InternViT needs pixel_values or pixel_embeds.")
            pixel_embeds = self.embeddings(pixel_values)
        encoded = self.encoder(pixel_embeds, output_hidden_states=bool(output_hidden_states))
        last = encoded.last_hidden_state
        output = BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last[:, 0], hidden_states=encoded.hidden_states
        )
        return output if return_dict is not False else cast("tuple[object, ...]", output.to_tuple())


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def _config(settings: dict[str, Any]) -> InternVisionConfig:
    return InternVisionConfig(**{key: value for key, value in settings.items() if key != "model_type"})


def _build(config: InternVisionConfig, depth: int) -> InternVisionModel:
    config.num_hidden_layers = depth
    return InternVisionModel(config)


def intern_vit_processor(size: int) -> CLIPImageProcessor:
    """Image processor: bicubic resize of the short edge to `size`, centre crop, ImageNet mean and deviation."""
    return CLIPImageProcessor(size=size, crop_size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def _processor(directory: Path | None, size: int | None) -> CLIPImageProcessor:
    """The processor for `size` pixels; the default is 448 for a directory with 448 in its name, else 336."""
    return intern_vit_processor(size or (448 if directory is not None and "448" in directory.name else 336))


TOWER = TowerSpec(
    config=_config,
    build=_build,
    processor=_processor,
    layers="encoder.layers.",
    positions="embeddings.position_embedding",
)
