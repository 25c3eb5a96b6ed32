"""One optimizer step, against transformers' forward and backward in float32 on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.self_test.inference import REFERENCE, Case, Loaded, Role, inputs, make_requests
from llava.self_test.report import CheckFailed, CheckSkipped, within

FLOAT32_LIMIT: Final = 1e-3
HALF_LIMIT: Final = 0.05
LEARNING_RATE: Final = 1e-3


class Step(NamedTuple):
    """Loss before and after an update, and the norm of each parameter's gradient (P,) in float32 on the CPU."""

    before: float
    after: float
    norms: Tensor


def make_batch(loaded: Loaded) -> dict[str, Any]:
    """A padded batch of different lengths, one row without an image; the second half of each row is supervised."""
    given = [inputs(loaded, request) for request in make_requests()]
    rows = [[*ids, *range(40, 44 + number)] for number, (ids, _) in enumerate(given)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    places = torch.arange(longest)
    unsupervised = (places >= lengths) | (places < lengths // 2) | (ids < 0)
    blank = torch.zeros_like(next(images["images"] for _, images in given if images))  # for the row without an image
    device = loaded.model.device
    return {
        "input_ids": ids.to(device),
        "attention_mask": (places < lengths).to(device),
        "labels": ids.masked_fill(unsupervised, IGNORE_INDEX).to(device),
        "images": torch.cat([images.get("images", blank) for _, images in given]),
    }


def train_step(loaded: Loaded, *, packed: bool, autocast: torch.dtype | None = None) -> Step:
    """Loss, backward and AdamW for everything but the tower; packed or as in transformers."""
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
    norms = torch.stack([parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None])
    optimizer.step()
    with torch.no_grad():
        return Step(float(before.detach()), float(loss()), norms.cpu())


def check_step(case: Case, role: Role, autocast: torch.dtype | None = None) -> str:
    """Losses and gradients of the model of `role`, with float32 weights, against the reference; both are reloaded."""
    if autocast is not None and not torch.amp.is_autocast_available(role.device.type):
        raise CheckSkipped(f"this torch does not support autocast on {role.device.type}")
    wanted = train_step(case.load(REFERENCE), packed=False)
    found = train_step(case.load(role), packed=True, autocast=autocast)
    if not found.after < found.before:
        raise CheckFailed(f"the loss did not fall: {found.before:.4f} to {found.after:.4f}")
    losses = [(found.before, wanted.before), (found.after, wanted.after)]
    errors = [abs(one - other) / other for one, other in losses]
    errors.append(float(((found.norms - wanted.norms) / wanted.norms).abs().max()))
    limit = FLOAT32_LIMIT if autocast is None else HALF_LIMIT
    return f"loss {found.before:.3f} -> {found.after:.3f}, {within(errors, limit)}"
