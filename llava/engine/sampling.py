"""Choosing the next token: greedy, or temperature and nucleus sampling from a generator of the request's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from llava.engine.request import SamplingParams

_COLDEST: Final = 1e-6  # a float32 logit divided by less may not be finite any more


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """A CPU generator for a sampled request (seeded from the system when no seed is given), None for a greedy one.

    One generator a request, on the CPU, so that neither neighbours in the batch nor the device change its draws.
    """
    if params.temperature == 0.0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities (V,) float32: softmax(logits / temperature) on the smallest top set of mass >= `top_p`.

    The most probable token always stays (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    """
    probabilities = torch.softmax(logits.float() / max(temperature, _COLDEST), dim=-1)  # (V,)
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the strictly more probable tokens
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return kept / kept.sum()


def choose(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> list[int | None]:
    """Next token of every row from logits (B, V); None for a row whose largest logit is no finite number."""
    best = logits.argmax(dim=-1)  # (B,); a NaN counts as the largest
    finite = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1).isfinite().tolist()
    tokens = [token if known else None for token, known in zip(best.tolist(), finite, strict=True)]
    for row, (options, generator) in enumerate(zip(params, generators, strict=True)):
        if generator is not None and tokens[row] is not None:
            probabilities = nucleus(logits[row].cpu(), options.temperature, options.top_p)
            tokens[row] = int(torch.multinomial(probabilities, 1, generator=generator))
    return tokens
