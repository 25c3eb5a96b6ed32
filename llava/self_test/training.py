"""One optimizer step, compared with forward and backward of transformers in float32 on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.self_test import CheckFailed, CheckSkipped, within
from llava.self_test.inference import REFERENCE, Case, Loaded, Role, make_requests, model_inputs

FLOAT32_LIMIT: Final = 1e-3
HALF_LIMIT: Final = 0.05
LEARNING_RATE: Final = 1e-3


def make_batch(loaded: Loaded) -> dict[str, Tensor]:
    """A padded batch of different lengths, one row without an image; the second half of each row is supervised."""
    given = [model_inputs(loaded, request) for request in make_requests()]
    rows = [[*ids, *range(40, 44 + number)] for number, (ids, _) in enumerate(given)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths, positions = torch.tensor([[len(row)] for row in rows]), torch.arange(longest)
    unsupervised = (positions >= lengths) | (positions < lengths // 2) | (ids < 0)
    blank = torch.zeros_like(next(images["images"] for _, images in given if images))  # for the row without an image
    device = loaded.model.device
    return {
        "input_ids": ids.to(device),
        "attention_mask": (positions < lengths).to(device),
        "labels": ids.masked_fill(unsupervised, IGNORE_INDEX).to(device),
        "images": torch.cat([images.get("images", blank) for _, images in given]),
    }


def train_step(loaded: Loaded, *, packed: bool, autocast: torch.dtype | None = None) -> Tensor:
    """Train all weights but the tower for one AdamW step, on packed sequences or as in transformers.

    Returns the loss before and after, and the gradient norm of each parameter: (2 + P,) in float32 on the CPU.
    """
    model, batch = loaded.model, make_batch(loaded)
    model.train(packed)
    parameters = [value for name, value in model.named_parameters() if "vision_tower" not in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    kind = model.device.type
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=kind == "cuda")

    def loss() -> Tensor:
        with torch.autocast(kind, dtype=autocast) if autocast is not None else nullcontext():
            value: Tensor = model(**batch).loss
        return value

    before = loss()
    before.backward()  # type: ignore[no-untyped-call]
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if missing:
        raise CheckFailed(f"{missing[0]} has no gradient")
    norms = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
    optimizer.step()
    with torch.no_grad():
        return torch.stack([before.detach().float(), loss().float(), *norms]).cpu()


def check_step(case: Case, role: Role, autocast: torch.dtype | None = None) -> str:
    """Losses and gradient norms of the model in `role`, with float32 weights, against the reference."""
    if autocast is not None and not torch.amp.is_autocast_available(role.device.type):
        raise CheckSkipped(f"this torch does not support autocast on {role.device.type}")
    wanted = train_step(case.load(REFERENCE), packed=False)
    found = train_step(case.load(role), packed=True, autocast=autocast)
    before, after = found[:2].tolist()
    if not after < before:
        raise CheckFailed(f"the loss did not decrease: {before:.4f} to {after:.4f}")
    error = float(((found - wanted) / wanted).abs().max())
    limit = FLOAT32_LIMIT if autocast is None else HALF_LIMIT
    return f"loss {before:.3f} -> {after:.3f}, {within([error], limit)}"
