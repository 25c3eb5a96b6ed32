"""A training step (forward, backward, AdamW) with a frozen tower: stage 1, stage 2, or text of mixed lengths."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import peak_mib, resident_mib, settings
from benchmarks.reference_way import loss_at_all_positions, use_reference_way
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.train.flops import shape_of, step_flops
from llava.train.throughput import trainable_parts

TEXTS = (640, 310, 150, 90)  # tokens


def image_batch(rows: int, vocabulary: int, pixels: int, text: int = 160) -> dict[str, Any]:
    """`rows` rows of one image and `text` tokens; about a fifth of the expanded positions is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (rows, text), generator=generator)
    ids[:, 5] = IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, :10] = IGNORE_INDEX
    images = torch.randn(rows, 3, pixels, pixels, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids).bool(), "images": images}


def text_batch(lengths: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """Rows of text of the given lengths, padded to the longest; the second half of each is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths))
    ends = torch.tensor(lengths)[:, None]
    mask = places < ends
    labels = torch.where(mask & (places >= ends // 2), ids, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": None}


def work(model: Any, batch: dict[str, Any]) -> float:
    """Model FLOPs of a step (`llava.train.flops`), the same for both implementations."""
    shape = shape_of(model.config, model.get_vision_tower())
    lengths = batch["attention_mask"].sum(1).double()
    images = 0 if batch["images"] is None else len(batch["images"])
    lengths = lengths + (shape.image_tokens - 1) * images / len(lengths)
    tokens = lengths.sum().item()
    supervised = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()
    length = (lengths**2).sum().item() / tokens  # mean row length over tokens
    return step_flops(shape, trainable_parts(model), tokens=tokens, length=length, images=images, supervised=supervised)


def run(chat: str, reference: bool, steps: int = 5, rows: int = 4, kind: str = "stage 2") -> dict[str, Any]:
    """Train for `steps` steps; `kind` is "stage 1" (projector only), "stage 2", or "texts" (mixed lengths)."""
    _, model, processor, _ = load_pretrained_model(Path(chat), device="cpu")
    model.train()
    if kind == "stage 1":
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=not reference)  # each side's default on the CPU
    vocabulary, pixels = model.config.vocab_size, processor.crop_size["height"]
    batch = text_batch(TEXTS[:rows], vocabulary) if kind == "texts" else image_batch(rows, vocabulary, pixels)
    operations = work(model, batch)
    if reference:
        use_reference_way(model)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # allocates the optimizer state
    before = resident_mib()
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = loss_at_all_positions(model, batch) if reference else model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {"seconds": min(seconds), "peak_mib": peak_mib(), "activations_mib": peak_mib() - before,
            "first_loss": losses[0], "operations": operations}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(**settings())))
