"""Answering short questions, several to a picture, greedily in float32: the engine against `generate` one at a time."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.measure import peak_mib, settings
from benchmarks.reference_way import use_reference_tower
from llava.conversation import get_template
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

WORDS = ("is", "there", "a", "red", "car", "on", "the", "left", "side", "of", "this", "picture", "near", "two", "dogs")


def prompts(pictures: int, each: int) -> list[tuple[Image.Image, str]]:
    """`each` different questions to every one of `pictures` noise images, rendered in the v1 template."""
    pairs = []
    for picture in range(pictures):
        noise = torch.randint(0, 256, (240, 320, 3), generator=torch.Generator().manual_seed(picture))
        image = Image.fromarray(noise.to(torch.uint8).numpy())
        for question in range(each):
            template = get_template("v1")
            words = " ".join(WORDS[(question + i) % len(WORDS)] for i in range(6 + question % 5))
            template.append_message(template.roles[0], f"<image>\n{words}?\nAnswer with one word.")
            template.append_message(template.roles[1], None)
            pairs.append((image, template.get_prompt()))
    return pairs


def one_at_a_time(model: Any, tokenizer: Any, processor: Any, pairs: list[Any], new_tokens: int) -> list[list[int]]:
    answers = []
    for image, prompt in pairs:
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt").unsqueeze(0)
        pixels = process_images([image], processor, model.config)
        with torch.inference_mode():
            out = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=new_tokens, use_cache=True,
                                 pad_token_id=0)  # fmt: skip
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def run(chat: str, reference: bool, pictures: int = 3, each: int = 18, new_tokens: int = 4) -> dict[str, Any]:
    tokenizer, model, processor, _ = load_pretrained_model(Path(chat), device="cpu")
    pairs = prompts(pictures, each)
    if reference:
        use_reference_tower(model, model.config.mm_vision_tower, torch.float32)
        start = time.perf_counter()
        answers = one_at_a_time(model, tokenizer, processor, pairs, new_tokens)
    else:
        engine = Engine(model, tokenizer, processor)
        params = SamplingParams(max_new_tokens=new_tokens)
        start = time.perf_counter()
        done = engine.generate([Request(prompt, [image], params) for image, prompt in pairs])
        answers = [list(completion.token_ids) for completion in done]
    seconds = time.perf_counter() - start
    eos = tokenizer.eos_token_id
    digest = hashlib.sha256(json.dumps([[t for t in row if t != eos] for row in answers]).encode()).hexdigest()
    return {"questions_per_second": len(pairs) / seconds, "peak_mib": peak_mib(), "answers": digest}


if __name__ == "__main__":
    print(json.dumps(run(**settings())))
