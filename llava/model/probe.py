"""A fixed image and question put to a model, so that two ways of computing the same function can be compared."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import CheckpointError
from llava.mm_utils import tokenizer_image_token

PROMPT: Final = f"USER: {DEFAULT_IMAGE_TOKEN}\nWhat color is the shape? ASSISTANT: The shape is red."
TOLERANCE: Final = 1e-3


def probe_inputs(tokenizer: Any, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Ids `(1, T)` with one placeholder -200, and pixels `(1, 3, S, S)` with structure in all directions."""
    side = image_processor.crop_size["height"]
    x = torch.linspace(-2.0, 2.0, side)
    pixels = torch.stack([torch.sin(3 * x)[:, None] * torch.cos(k * x)[None, :] + x[None, :] for k in (1, 2, 5)])
    ids = torch.tensor([tokenizer_image_token(PROMPT, tokenizer)])
    return ids, pixels.unsqueeze(0)


@torch.no_grad()
def probe(model: Any, tokenizer: Any, image_processor: Any) -> Tensor:
    """Logits `(L, V)` in float32 over the spliced probe."""
    ids, pixels = probe_inputs(tokenizer, image_processor)
    logits: Tensor = model(input_ids=ids, images=pixels).logits
    return logits[0].float()


def compare(found: Tensor, expected: Tensor, what: str) -> float:
    """The largest difference of two probes; more than `TOLERANCE` of the largest logit is a `CheckpointError`."""
    error = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not error <= TOLERANCE * scale:  # also when it is not a number
        raise CheckpointError(
            f"{what} do not agree: logits on the fixed probe differ by {error:.3g} (largest logit {scale:.3g}); "
            "nothing was written."
        )
    return error
