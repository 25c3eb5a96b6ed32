"""Losses of supervised tokens: the interface, and cross-entropy with label smoothing and z-loss.

`llava.model.language_model.lm_head` computes them without a table of all logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from llava.errors import ConfigError


@dataclass(frozen=True)
class Tokens:
    """Supervised tokens of a batch, or a chunk of C of them.

    Attributes:
        hidden: `(C, D)`, the inputs of the head; a loss may depend on them.
        targets: `(C,)`, the token ids to predict.
        rows, columns: `(C,)`, the row of the batch and the index in the row, with images expanded.
        inputs: the `input_ids`, `attention_mask` and `images` of the batch; the same object for all of its chunks.
    """

    hidden: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def chunk(self, hidden: Tensor, part: slice) -> Tokens:
        """A part of the tokens, whose hidden states `(S, D)` can be other than those of all tokens."""
        return Tokens(hidden[part], self.targets[part], self.rows[part], self.columns[part], self.inputs)


class TokenLoss(Protocol):
    """Loss of each token: `(C,)` from float32 logits `(C, V)`, targets `(C,)` and the chunk; C can be 0."""

    def __call__(self, logits: Tensor, targets: Tensor, tokens: Tokens, /) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy, with label smoothing as in `torch.nn.functional.cross_entropy`.

    `z_loss` is the coefficient of the squared log-partition function, logsumexp(logits)² (PaLM, arXiv:2204.02311).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, tokens: Tokens | None = None, /) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        return losses + self.z_loss * logits.logsumexp(-1).square() if self.z_loss else losses

    def differentiate(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Losses `(C,)`; overwrites the logits with the gradient of the losses' sum weighted by `weights` `(C,)`."""
        smoothing, scale, index = self.label_smoothing, weights[:, None], targets[:, None]
        mean = logits.mean(-1, keepdim=True) if smoothing else None
        largest = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, index) - largest
        total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
        log_total = total.log()
        losses, log_partition = log_total - chosen, log_total + largest
        if mean is not None:
            losses = (1 - smoothing) * losses + smoothing * (log_partition - mean)
        if self.z_loss:
            losses = losses + self.z_loss * log_partition.square()
        logits.mul_(scale * (1 + 2 * self.z_loss * log_partition) / total)
        if smoothing:
            logits.sub_(scale * (smoothing / logits.shape[-1]))
        logits.scatter_(-1, index, logits.gather(-1, index) - (1 - smoothing) * scale)
        return losses.squeeze(-1)


def token_losses(loss: TokenLoss, logits: Tensor, tokens: Tokens) -> Tensor:
    """The losses `(C,)` of a chunk; raises `ConfigError` for another shape."""
    losses = loss(logits, tokens.targets, tokens)
    if losses.shape != tokens.targets.shape:
        raise ConfigError(
            f"A loss must return one value per token, shape {tuple(tokens.targets.shape)}; {loss} returned shape "
            f"{tuple(losses.shape)}."
        )
    return losses


def reduce_losses(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of token losses `(S,)` weighted by `weights` `(S,)`; without weights their mean, 0 for S = 0."""
    return losses.sum() / max(1, len(losses)) if weights is None else (losses * weights).sum()
