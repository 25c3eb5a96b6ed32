"""Random checkpoints of any size in the published layout, for measurements without downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel
from tests.tiny import make_tokenizer


@dataclass(frozen=True)
class Size:
    """Widths and depths of the tower and the language model; the head size is 64 in both."""

    tower_width: int = 512
    tower_layers: int = 12
    width: int = 768
    layers: int = 8
    vocabulary: int = 32000
    pixels: int = 336


def make_checkpoint(root: Path, size: Size, dtype: torch.dtype = torch.float32) -> Path:
    """Write `root/tower` and `root/chat` (select layer -4) and return the latter.

    The tokenizer is the small one of the tests. Rows of the head beyond its vocabulary are zero, so the model generates
    only tokens that it knows.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        tower = InternVisionModel(
            InternVisionConfig(
                hidden_size=size.tower_width,
                num_attention_heads=size.tower_width // 64,
                intermediate_size=4 * size.tower_width,
                num_hidden_layers=size.tower_layers,
                image_size=224,
            )
        )
        tower.save_pretrained(root / "tower")
        del tower
        config = LlavaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3 // 64 * 64,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 64,
            max_position_embeddings=4096,
            pad_token_id=0,
            mm_vision_tower=str(root / "tower"),
            mm_hidden_size=size.tower_width,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-4,
            mm_vision_image_size=size.pixels,
            mm_use_im_patch_token=False,
            image_aspect_ratio="pad",
            conv_template="v1",
        )
        model = LlavaLlamaForCausalLM(config)
        tokenizer = make_tokenizer(root / "chat")
        with torch.no_grad():
            model.lm_head.weight[len(tokenizer) :] = 0
        model.save_pretrained(root / "chat")
    finally:
        torch.set_default_dtype(torch.float32)
    return root / "chat"
