"""Compare the logits of two models on a fixed image and prompt."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import CheckpointError
from llava.mm_utils import tokenizer_image_token

PROMPT: Final = f"USER: {DEFAULT_IMAGE_TOKEN}\nWhat color is the shape? ASSISTANT: The shape is red."
TOLERANCE: Final = 1e-3


def probe_inputs(tokenizer: PreTrainedTokenizerBase, image_processor: CLIPImageProcessor) -> tuple[Tensor, Tensor]:
    """Ids `(1, T)` with one image token -200, and pixels `(1, 3, S, S)` that vary in all directions."""
    x = torch.linspace(-2.0, 2.0, image_processor.crop_size["height"])
    pixels = torch.stack([torch.sin(3 * x)[:, None] * torch.cos(k * x)[None, :] + x[None, :] for k in (1, 2, 5)])
    ids = torch.tensor([tokenizer_image_token(PROMPT, tokenizer)])
    return ids, pixels.unsqueeze(0)


@torch.no_grad()
def probe_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor: CLIPImageProcessor
) -> Tensor:
    """Logits `(L, V)` of `model` on the probe after the splice, in float32."""
    ids, pixels = probe_inputs(tokenizer, image_processor)
    logits: Tensor = model(input_ids=ids, images=pixels).logits
    return logits[0].float()


def check_logits(found: Tensor, expected: Tensor, what: str) -> float:
    """The largest difference. Raises `CheckpointError` if it is NaN or above `TOLERANCE` times the largest logit."""
    error = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not error <= TOLERANCE * scale:
        raise CheckpointError(
            f"{what} do not agree: logits on the fixed probe differ by {error:.3g} (largest logit {scale:.3g}); "
            "nothing was kept."
        )
    return error


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters but not the buffers: rotary tables are not stored and keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
