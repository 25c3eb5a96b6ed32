"""Vicuna-7B with InternViT-6B, or a small model of the same kind, with random weights created on a device.

Nothing is read from disk: for measurements on a GPU, where loading 24.5 GB of weights would take longer than using
them, and for traces under `FakeTensorMode`, where they take no memory.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.modeling_utils import no_init_weights

from llava.engine import Engine
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.tower import VisionTower
from tests.tiny import make_tokenizer

SELECT_LAYER: Final = -4  # features come from the fourth layer from the end; later layers are not built
STD: Final = 0.02
WORDS: Final = 260  # the first of the small tokenizer's pieces that are neither special nor bytes
TOWER_NAME: Final = "InternViT-6B-224px"


@dataclass(frozen=True)
class ModelSize:
    """Widths, depths and heads of the language model and of the whole vision tower."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000
    tower_hidden: int = 3200
    tower_intermediate: int = 12800
    tower_layers: int = 48
    tower_heads: int = 25


FULL: Final = ModelSize()
QUICK: Final = ModelSize(
    hidden=256,
    intermediate=688,
    layers=4,
    heads=4,
    tower_hidden=256,
    tower_intermediate=1024,
    tower_layers=7,
    tower_heads=4,
)


def make_model(
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    pixels: int = 336,
    size: ModelSize | None = None,
) -> LlavaLlamaForCausalLM:
    """A chat model in evaluation mode with its vision tower loaded, weights random; `size` defaults to `FULL`.

    Each weight is allocated once, in `dtype` on `device`, so the peak is the model's own size.
    """
    with no_init_weights(), torch.device("meta"):
        model = LlavaLlamaForCausalLM(chat_config(size or FULL, pixels))
        tower = model.get_vision_tower()
        assert tower is not None
        _build_tower(tower)
    for layer in model.model.layers:
        layer.self_attn._init_rope()  # the only buffers; their values are needed
    _materialize(model, torch.device(device), dtype)
    return model.eval()


def chat_config(size: ModelSize, pixels: int) -> LlavaConfig:
    """The configuration of a chat checkpoint, with the settings of its tower inside."""
    tower = {
        "model_type": "intern_vit_6b",
        "hidden_size": size.tower_hidden,
        "intermediate_size": size.tower_intermediate,
        "num_hidden_layers": size.tower_layers,
        "num_attention_heads": size.tower_heads,
        "patch_size": 14,
        "image_size": 448 if pixels == 448 else 224,  # of the position table; another one is resampled
    }
    return LlavaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        mm_vision_tower=TOWER_NAME,
        mm_vision_tower_config=tower,
        mm_hidden_size=size.tower_hidden,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=SELECT_LAYER,
        mm_vision_select_feature="patch",
        mm_vision_image_size=pixels,
        mm_use_im_patch_token=False,
        image_aspect_ratio="pad",
        conv_template="v1",
    )


def make_engine(model: LlavaLlamaForCausalLM, **options: Any) -> Engine:
    """An engine whose answers have the requested length: EOS is ignored.

    Prompts are token ids from 260 to 380 (the words of the small tokenizer). The other rows of the head are zeroed, so
    the model generates only words.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    with torch.no_grad():
        model.lm_head.weight[:WORDS] = 0
        model.lm_head.weight[len(tokenizer) :] = 0
    engine = Engine(model, tokenizer, model.get_vision_tower().image_processor, **options)  # type: ignore[union-attr]
    engine.special.end = frozenset()
    return engine


def _build_tower(tower: VisionTower) -> None:
    """Build the layers up to the selected one, without weights and without looking for the tower's directory."""
    tower.directory = None
    model = tower.spec.build(copy.deepcopy(tower.config), tower.depth)
    tower.vision_tower = model.requires_grad_(False).eval()


@torch.no_grad()
def _materialize(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace meta parameters by random ones on `device`, and move the buffers there."""
    for module in model.modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            weight = nn.Parameter(_weight(f"{kind}.{name}", parameter.shape, device, dtype), parameter.requires_grad)
            setattr(module, name, weight)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _weight(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=device)
    if "norm" in name.lower():
        return weight.fill_(1.0)
    return weight.normal_(0.0, STD)
