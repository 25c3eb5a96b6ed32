"""Logits of single rows before sampling: token biases, penalties and grammar masks; and log probabilities."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llava.engine.guided import Guide, grammar_masks
from llava.engine.sequence import SamplingParams, TokenLogprobs
from llava.model.transfer import Numbers, upload


class TokenTable:
    """The tokens of a request whose logits change, each with its bias and how often it was generated.

    `presence_penalty` and `frequency_penalty` count generated tokens (OpenAI), `repetition_penalty` also those of the
    prompt (Keskar et al., "CTRL", 2019). The arrays have an entry for every distinct token, so a step copies them
    without a Python loop.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self._repetition, self._frequency = params.repetition_penalty, params.frequency_penalty
        self._presence = params.presence_penalty
        self._counted = (self._repetition, self._frequency, self._presence) != (1.0, 0.0, 0.0)
        self._tokens, self._biases = array("i", params.logit_bias), array("f", params.logit_bias.values())
        self._counts = array("f", [-1.0] * len(self._tokens))  # -1: has not occurred, 0: only in the prompt
        self._index = {token: at for at, token in enumerate(self._tokens)}
        if self._repetition != 1.0:
            for token in {token for token in prompt if token >= 0}:  # image tokens are negative
                self._add(token, 0.0)

    @classmethod
    def build(cls, params: SamplingParams, prompt: Iterable[int]) -> TokenTable | None:
        """The table of a request, or None if it changes no logits."""
        table = cls(params, prompt)
        return table if table._counted or table._tokens else None

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, token: int) -> None:
        """Count a generated token."""
        if self._counted:
            self._add(token, 1.0)

    def _add(self, token: int, count: float) -> None:
        at = self._index.setdefault(token, len(self._tokens))
        if at < len(self._tokens):
            self._counts[at] = max(self._counts[at], 0.0) + count
        else:
            self._tokens.append(token)
            self._biases.append(0.0)
            self._counts.append(count)

    def columns(self, row: int) -> list[np.ndarray]:
        """Row, token, bias, and scale and shift of the penalties, for every entry."""
        tokens, bias = np.array(self._tokens, dtype=np.int32), np.array(self._biases, dtype=np.float32)
        counts = np.array(self._counts, dtype=np.float32)
        scale = np.where(counts >= 0, np.float32(self._repetition), np.float32(1))
        shift = np.float32(self._frequency) * counts.clip(0) + np.float32(self._presence) * (counts > 0)
        return [np.full_like(tokens, row), tokens, bias, scale, shift.astype(np.float32)]


def table_columns(tables: Sequence[TokenTable | None]) -> list[Numbers]:
    """The columns of the tables of a batch, for `adjust_logits`; empty without tables."""
    parts = [table.columns(row) for row, table in enumerate(tables) if table is not None]
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]


def adjust_logits(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Add `bias`, then apply penalties, in place, at distinct positions (rows, tokens) of `logits` (B, V)."""
    biased = logits[rows, tokens] + bias
    logits[rows, tokens] = torch.where(biased > 0, biased / scale, biased * scale) - shift


def mask_logits(logits: Tensor, guides: Sequence[Guide | None]) -> None:
    """Set the logits of tokens that a row's grammar forbids to -inf, in place. Rows without a grammar are unchanged.

    On CUDA, the masks are computed while the forward pass runs, and uploaded asynchronously.
    """
    rows = [row for row, guide in enumerate(guides) if guide is not None]
    masks = grammar_masks([guide for guide in guides if guide is not None])  # (n, ceil(V / 32)) int32
    index, masks = upload([torch.tensor(rows), masks.view(torch.uint8)], logits.device)
    steps = torch.arange(8, device=logits.device, dtype=torch.uint8)
    forbidden = (masks.unsqueeze(-1) & (torch.ones_like(steps) << steps)) == 0  # (n, bytes, 8)
    forbidden = forbidden.flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        logits[index] = logits[index].masked_fill(forbidden, -torch.inf)


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Log-softmax of `logits` (B, V) at `tokens` (B,) and at the `count` most probable tokens.

    Returns int32 (B, 1 + 2 * count): log probability, ids, log probabilities; log probabilities are float32 bits.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens.clamp(min=0).unsqueeze(-1))
    values, ids = logprobs.topk(count)
    return torch.cat([chosen.view(torch.int32), ids.int(), values.view(torch.int32)], dim=-1)


class StepOutput(NamedTuple):
    """Tokens of one step on the host, and the log probabilities of the rows that request them."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


def download(tokens: Tensor, logprobs: Tensor | None, params: Sequence[SamplingParams]) -> StepOutput:
    """Copy `tokens` (B,) and the result of `token_logprobs` to the host, in one copy."""
    if logprobs is None:
        return StepOutput(tokens.tolist(), [None] * len(params))
    packed = torch.cat([tokens.int().unsqueeze(-1), logprobs], dim=-1).cpu()
    found, width = packed[:, 0].tolist(), (packed.shape[1] - 2) // 2
    ids, values = packed[:, 2 : 2 + width].tolist(), packed[:, 2 + width :].view(torch.float32).tolist()
    chosen = packed[:, 1].view(torch.float32).tolist()
    return StepOutput(
        found,
        [
            None
            if one.logprobs is None
            else TokenLogprobs(token, logprob, tuple(zip(ids[row], values[row]))[: one.logprobs])
            for row, (one, token, logprob) in enumerate(zip(params, found, chosen, strict=True))
        ],
    )
