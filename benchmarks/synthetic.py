"""Random checkpoints of any size in the published layout, for measurements without downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel
from tests.tiny import make_tokenizer

# Answers of a random model hardly depend on the prompt; these factors make them differ by image and question.
FACTORS = {"embed_tokens": 50.0, "mm_projector.2": 50.0, "q_proj": 4.0, "k_proj": 4.0, "o_proj": 8.0, "down_proj": 8.0}


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


def make_answers_differ(chat: Path) -> None:
    """Change a random checkpoint so that answers are whole words, never end, and depend on the image and the question.

    Such answers tokenize in the next turn as they were generated, as those of a trained model mostly do.
    """
    from transformers import AutoTokenizer  # llava is imported first: it filters a warning of transformers

    tokenizer = AutoTokenizer.from_pretrained(chat, use_fast=False)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    silent = [at for at, piece in enumerate(pieces) if not (piece.startswith("▁") and piece.strip("▁"))]
    state = load_file(chat / "model.safetensors")
    for name, weight in state.items():
        weight *= next((factor for part, factor in FACTORS.items() if f".{part}.weight" in name), 1.0)
    state["lm_head.weight"][silent] = 0
    state["lm_head.weight"][len(tokenizer) :] = 0
    save_file(state, chat / "model.safetensors", {"format": "pt"})
