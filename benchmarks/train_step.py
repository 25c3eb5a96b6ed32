"""One stage-2 step (forward, backward, AdamW) on full-length multimodal rows, tower frozen."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import peak_mib, resident_mib, settings
from benchmarks.reference_way import loss_at_all_positions, use_reference_tower
from llava.model.builder import load_pretrained_model


def batch_of(rows: int, vocabulary: int, pixels: int, text: int = 160) -> dict[str, torch.Tensor]:
    """`rows` rows of one image and `text` words; about a fifth of the expanded positions is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (rows, text), generator=generator)
    ids[:, 5] = -200
    labels = ids.clone()
    labels[:, :10] = -100
    images = torch.randn(rows, 3, pixels, pixels, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids).bool(), "images": images}


def run(chat: str, reference: bool, steps: int = 3, rows: int = 4) -> dict[str, Any]:
    _, model, processor, _ = load_pretrained_model(Path(chat), device="cpu")
    if reference:
        use_reference_tower(model, model.config.mm_vision_tower, torch.float32)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = batch_of(rows, model.config.vocab_size, processor.crop_size["height"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # allocates its state, so that what follows is the step itself
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
    return {"seconds": statistics.median(seconds), "peak_mib": peak_mib(), "activations_mib": peak_mib() - before,
            "first_loss": losses[0]}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(**settings())))
