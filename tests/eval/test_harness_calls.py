"""What harnesses import from this package, and the calls by which their LLaVA models answer a question."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

# imports of lmms-eval 0.7.3 (model `llava`) and of VLMEvalKit (`LLaVA`)
IMPORTS = {
    "llava.constants": ("DEFAULT_IMAGE_TOKEN", "IMAGE_TOKEN_INDEX"),
    "llava.conversation": ("SeparatorStyle", "conv_templates"),
    "llava.mm_utils": (
        *("KeywordsStoppingCriteria", "get_model_name_from_path", "process_images", "tokenizer_image_token"),
    ),
    "llava.model.builder": ("load_pretrained_model",),
}


@pytest.mark.parametrize("module", IMPORTS)
def test_the_names_exist(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in IMPORTS[module] if not hasattr(found, name)] == []


SIZES: dict[str, Any] = {"image_sizes": [(30, 20)]}


@pytest.mark.parametrize("more", [{}, SIZES, {**SIZES, "modalities": ["image"]}])
def test_pixels_in_half_precision_are_answered(more: dict[str, Any], tiny_dirs: dict[str, Path]) -> None:
    """As lmms-eval passes them: a list in 16 bit, with the sizes of the images."""
    path = str(tiny_dirs["chat"])
    tokenizer, model, processor, length = load_pretrained_model(
        path, None, get_model_name_from_path(path), device_map="cpu", attn_implementation="sdpa"
    )
    assert processor is not None and length > 0
    image = Image.new("RGB", (30, 20), "red")
    pixels = [each.to(torch.float16) for each in process_images([image], processor, model.config)]
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    found = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    ids = torch.as_tensor(found).unsqueeze(0)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, images=pixels, do_sample=False, num_beams=1,
        max_new_tokens=6, use_cache=True, **more,
    )  # fmt: skip
    rounded = [each.to(torch.float32) for each in pixels]
    assert torch.equal(output, model.generate(ids, images=rounded, do_sample=False, max_new_tokens=6))
