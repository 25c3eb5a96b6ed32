"""Vision transformers of timm (`--vision_tower timm/NAME[:FILE]`) in the tower registry.

`NAME` is a model of timm, for example `vit_small_patch14_reg4_dinov2.lvd142m`; `FILE` holds its weights in timm's
layout (safetensors, or a PyTorch file of tensors). Without `FILE` the weights come from the hub repository `timm/NAME`.
A directory in the layout of such a repository works too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import timm
from PIL import Image
from timm.models import PretrainedCfg
from torch import nn
from transformers import CLIPImageProcessor

from llava.errors import CheckpointError
from llava.model.registry import TowerSpec
from llava.model.weights import empty_weights

DATA_KEYS: Final = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
# Keyword arguments of a repository's `model_args` that are set here, or that concern the head, which is not built.
KNOWN_ARGUMENTS: Final = {"img_size", "dynamic_img_size", "global_pool", "num_classes", "fc_norm", "drop_path_rate"}


@dataclass
class TimmConfig:
    """Shape of a timm vision transformer."""

    architecture: str
    image_size: int  # of the position table
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


class TimmImageProcessor(CLIPImageProcessor):
    """Image processor of a timm data config; with `crop_mode` `squash`, images are resized without regard to aspect."""

    def __init__(self, data: PretrainedCfg, size: int) -> None:
        scaled = math.floor(size / (data.crop_pct or 1.0))
        resample = Image.Resampling[(data.interpolation or "bicubic").upper()]
        super().__init__(
            size=scaled, crop_size=size, resample=resample, image_mean=list(data.mean), image_std=list(data.std)
        )
        self.squash = data.crop_mode == "squash"

    def resize(self, image: Any, size: dict[str, int], **kwargs: Any) -> Any:
        if not self.squash:
            return super().resize(image, size, **kwargs)
        from transformers.image_transforms import resize

        side = size["shortest_edge"]
        return resize(image, size=(side, side), **kwargs)


def named_settings(name: str) -> dict[str, Any]:
    """The settings of `timm/NAME[:FILE]` from timm's own tables; `CheckpointError` for a name timm does not have."""
    model = name.removeprefix("timm/").partition(":")[0]
    try:
        data = timm.get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"timm {timm.__version__} has no model {model!r} ({error}); list them with timm.list_models()."
        ) from error
    settings = {key: getattr(data, key) for key in DATA_KEYS}
    return {"model_type": "timm", "architecture": model.partition(".")[0], "pretrained_cfg": settings}


def tower(settings: dict[str, Any]) -> TowerSpec:
    """The registry entry for the settings of one timm model."""
    architecture, arguments = str(settings["architecture"]), settings.get("model_args") or {}
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"timm {timm.__version__} has no model {architecture!r}; list them with timm.list_models()."
        )
    if unknown := sorted(set(arguments) - KNOWN_ARGUMENTS):
        raise CheckpointError(
            f"The timm tower {architecture!r} sets {', '.join(unknown)} in model_args, which is not supported; use a "
            "tower without it."
        )
    data = PretrainedCfg(**{key: value for key, value in settings["pretrained_cfg"].items() if key in DATA_KEYS})
    image_size = int(arguments.get("img_size") or data.input_size[-1])
    with empty_weights():
        model = create(architecture, image_size)
    positions = getattr(model, "pos_embed", None) is not None
    class_token = getattr(model, "cls_token", None) is not None
    config = TimmConfig(
        architecture=architecture,
        image_size=image_size,
        patch_size=int(model.patch_embed.patch_size[0]),
        hidden_size=int(model.num_features),
        intermediate_size=int(model.blocks[0].mlp.fc2.in_features),
        num_hidden_layers=len(model.blocks),
        num_attention_heads=int(model.blocks[0].attn.num_heads),
    )

    def processor(directory: Path | None, size: int | None) -> TimmImageProcessor:
        return TimmImageProcessor(data, size or image_size)

    return TowerSpec(
        config=lambda settings: config,
        build=build,
        processor=processor,
        layers="blocks.",
        positions="pos_embed" if positions else None,
        unused=("norm.", "fc_norm.", "head.", "head_dist.", "attn_pool.", "mask_token"),
        class_token=class_token,
        registers=int(model.num_prefix_tokens) - class_token,
    )


def create(architecture: str, image_size: int) -> Any:
    """A timm model without head that returns its tokens; it resamples positions to the image where possible."""
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "global_pool": "", "img_size": image_size}
    model: Any = None
    for arguments in ({**options, "dynamic_img_size": True}, options):
        try:
            model = timm.create_model(architecture, **arguments)
            break
        except TypeError:  # an argument that this architecture does not have
            continue
    if not all(hasattr(model, name) for name in ("blocks", "patch_embed", "num_prefix_tokens")):
        raise CheckpointError(f"timm's {architecture!r} is not a plain vision transformer; use a ViT or EVA model.")
    return model


def build(config: TimmConfig, depth: int) -> nn.Module:
    """The first `depth` blocks, without the final norm."""
    model: nn.Module = create(config.architecture, config.image_size)
    model.blocks = model.blocks[:depth]  # type: ignore[index]
    model.norm, model.fc_norm = nn.Identity(), nn.Identity()
    return model
