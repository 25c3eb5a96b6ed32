"""Output layer that computes logits, or in one call the loss of supervised tokens without a table of their logits.

The loss runs over chunks of tokens: logits, losses and, if gradients are enabled, the gradients of the hidden states
and of the weight. The backward pass only scales these. `CrossEntropy` has gradients in closed form; autograd
differentiates any other `TokenLoss` within its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llava.model.language_model.loss import CrossEntropy, TokenLoss, Tokens, reduce_losses, token_losses

# Limits in bytes of a chunk's logits, with their copies in 16 bits: 213 tokens of 32,000 words in float32 on the CPU.
# GPUs need larger products to be busy.
CHUNK_BYTES: Final = 26 * 2**20
CHUNK_BYTES_CUDA: Final = 64 * 2**20
CROSS_ENTROPY: Final = CrossEntropy()
BLOCK_BYTES: Final = 8 * 2**20  # rows of the weight's gradient that are finished at a time, in float32


def supervised_loss(
    head: nn.Module, tokens: Tokens, row_weights: Tensor | None, loss: TokenLoss, logits: Tensor | None = None
) -> Tensor:
    """Loss of a batch: the mean over its tokens, or weighted by the weight `(B,)` of each token's row.

    With `logits` `(S, V)`, or with a head other than `LMHead` (such as one with an adapter), the table is used.
    """
    weights = None if row_weights is None else row_weights.to(tokens.hidden.device).index_select(0, tokens.rows)
    if logits is None and isinstance(head, LMHead):
        return head(tokens.hidden, tokens=tokens, weights=weights, loss=loss)  # type: ignore[no-any-return]
    table = head(tokens.hidden) if logits is None else logits
    return reduce_losses(token_losses(loss, table.to(loss_dtype(table)), tokens), weights)


class LMHead(nn.Linear):
    """Output layer: logits of hidden states, or with `tokens` their loss.

    The loss is computed in the layer's own call, in which ZeRO-3 has its weight gathered.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> LMHead:
        """A head with the parameters of `linear`, which may be partitioned."""
        head = cls.__new__(cls)
        head.__dict__.update(linear.__dict__)
        return head

    def forward(
        self,
        hidden: Tensor,
        *,
        tokens: Tokens | None = None,
        weights: Tensor | None = None,
        loss: TokenLoss = CROSS_ENTROPY,
    ) -> Tensor:
        """Logits `(..., V)` of `hidden` `(..., D)`; with `tokens` and their weights `(S,)` the loss of `(S, D)`."""
        if tokens is None:
            return super().forward(hidden)
        inputs = hidden, self.weight, self.bias
        if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
            total: Tensor = _ChunkedLoss.apply(*inputs, tokens, weights, loss)
            return total
        return _run(inputs, tokens, weights, loss)[0]


class _ChunkedLoss(torch.autograd.Function):
    """Head and loss; the forward pass computes the gradients, which the backward pass scales and hands over."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        weights: Tensor | None,
        loss: TokenLoss,
    ) -> Tensor:
        total, ctx.gradients = _run((hidden, weight, bias), tokens, weights, loss, ctx.needs_input_grad[:3])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("The gradients of this loss were already used; run the forward pass again.")
        ctx.gradients = None  # the parameter takes its gradient over without a copy
        return *gradients.take(upstream), None, None, None


class _Product:
    """Logits in float32 of one chunk of `tokens` tokens after the other, in the same memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None, exact: torch.dtype, count: int) -> None:
        self.weight, self.bias = weight, bias
        dtypes = {exact, weight.dtype}
        limit = CHUNK_BYTES_CUDA if weight.device.type == "cuda" else CHUNK_BYTES
        most = max(1, limit // (len(weight) * sum(dtype.itemsize for dtype in dtypes)))
        self.tokens = max(1, math.ceil(count / max(1, math.ceil(count / most))))  # chunks of equal size
        buffers = {dtype: weight.new_empty(self.tokens, len(weight), dtype=dtype) for dtype in dtypes}
        self.product, self.logits = buffers[weight.dtype], buffers[exact]

    def __call__(self, hidden: Tensor) -> Tensor:
        logits, product = self.logits[: len(hidden)], self.product[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=product)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=product)
        return logits if product.dtype == logits.dtype else logits.copy_(product)

    def rounded(self, gradient: Tensor) -> Tensor:
        """The gradient `(C, V)` of logits in the dtype of products."""
        product = self.product[: len(gradient)]
        return gradient if gradient.dtype == product.dtype else product.copy_(gradient)


class _WeightGradient:
    """Gradient `(V, D)` of the weight, summed over chunks in float32.

    In 16 bits, reading and writing the sum for each chunk would take longer than the product. There, the chunks'
    gradients of the logits are kept in 16 bits until they are as large as the sum, and then multiplied at once.
    """

    def __init__(self, weight: Tensor, states: Tensor, chunk: int) -> None:
        self.states, self.shape, self.exact = states, weight.shape, loss_dtype(weight)
        self.first = self.last = 0  # the tokens that are kept
        self.words, width = weight.shape
        self.kept: list[Tensor] = []  # of blocks of words, so that one is freed before the next one's gradient is made
        self.sums: list[Tensor] = []
        if states.dtype == self.exact:
            self.sums = [torch.zeros_like(weight, dtype=self.exact)]
            return
        self.words = max(1, BLOCK_BYTES // (width * self.exact.itemsize))
        tokens = min(len(states), max(chunk, width * self.exact.itemsize // states.dtype.itemsize))
        self.kept = [states.new_empty(tokens, len(block)) for block in torch.split(weight, self.words)]

    def add(self, part: slice, logits: Tensor) -> None:
        """Add the product of the gradient `(C, V)` of a chunk's logits and the chunk's hidden states."""
        if not self.kept:
            self.sums[0].addmm_(logits.t(), self.states[part])
            return
        if part.start + len(logits) - self.first > len(self.kept[0]):
            self.sums = self.sums or [
                self.states.new_zeros(kept.shape[1], self.shape[1], dtype=self.exact) for kept in self.kept
            ]
            for kept, total in zip(self.kept, self.sums, strict=True):
                total.add_(self._product(kept))
            self.first = part.start
        self.last = part.start + len(logits)
        for kept, words in zip(self.kept, torch.split(logits, self.words, dim=1), strict=True):
            kept[part.start - self.first : self.last - self.first].copy_(words)

    def _product(self, kept: Tensor) -> Tensor:
        """The gradient of a block of words by the tokens that are kept."""
        return kept[: self.last - self.first].t() @ self.states[self.first : self.last]

    def take(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient times `scale`; frees the sums."""
        if not self.kept:
            return self.sums.pop().mul_(scale).to(dtype)
        gradient = scale.new_empty(self.shape, dtype=dtype)
        scratch = scale.new_empty(min(self.words, len(gradient)), self.shape[1])
        for part in torch.split(gradient, self.words):
            total = scratch[: len(part)].copy_(self._product(self.kept.pop(0)))
            if self.sums:
                total.add_(self.sums.pop(0))
            part.copy_(total.mul_(scale))
        return gradient


class _Gradients:
    """Gradients of a loss whose largest token weight is 1: in 16 bits they neither vanish nor overflow.

    `take` multiplies them by `scale`, the largest weight, and by the gradient of the loss.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        needs: Sequence[bool],
        scale: Tensor,
        product: _Product,
        states: Tensor,
    ) -> None:
        hidden, weight, bias = inputs
        self.scale, self.product, self.exact = scale, product, loss_dtype(weight)
        self.dtypes = hidden.dtype, weight.dtype
        self.hidden = torch.empty_like(states, requires_grad=False) if needs[0] else None
        self.weight = _WeightGradient(weight, states, product.tokens) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=self.exact) if bias is not None and needs[2] else None

    def add(self, part: slice, of_logits: Tensor, of_hidden: Tensor | None) -> None:
        """Add a chunk: the gradients of its logits `(C, V)` and, by the loss itself, of its hidden states `(C, D)`."""
        if self.bias is not None:
            self.bias.add_(of_logits.sum(0))
        of_logits = self.product.rounded(of_logits)
        if self.hidden is not None:
            torch.mm(of_logits, self.product.weight, out=self.hidden[part])
            if of_hidden is not None:
                self.hidden[part].add_(of_hidden)
        if self.weight is not None:
            self.weight.add(part, of_logits)

    def take(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden states, weight and bias."""
        scale = upstream * self.scale
        hidden, bias = (None if one is None else one.to(self.exact).mul_(scale) for one in (self.hidden, self.bias))
        return (
            None if hidden is None else hidden.to(self.dtypes[0]),
            None if self.weight is None else self.weight.take(scale, self.dtypes[1]),
            None if bias is None else bias.to(self.dtypes[1]),
        )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of products with `tensor`: that of autocast, if it is enabled."""
    kind = tensor.device.type
    autocast = torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else tensor.dtype


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _run(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    tokens: Tokens,
    weights: Tensor | None,
    loss: TokenLoss,
    needs: Sequence[bool] = (),
) -> tuple[Tensor, _Gradients | None]:
    """The loss of all tokens, and the gradients of those `inputs` (hidden states, weight, bias) that `needs` names."""
    hidden, weight, bias = inputs
    dtype, kind = loss_dtype(weight), hidden.device.type
    relative = hidden.new_ones(len(hidden), dtype=dtype)
    scale = hidden.new_full((), 1 / max(1, len(hidden)), dtype=dtype)
    weights = None if weights is None else weights.to(dtype)
    if weights is not None and len(weights):
        scale = weights.abs().amax()
        relative = weights / scale.clamp_min(torch.finfo(dtype).tiny)
    states, table = (one.to(compute_dtype(weight)) for one in (hidden, weight))  # cast once, not per chunk
    product = _Product(table, None if bias is None else bias.to(table.dtype), dtype, len(hidden))
    gradients = _Gradients(inputs, needs, scale, product, states) if any(needs) else None
    losses = [hidden.new_empty(0, dtype=dtype)]
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        for start in range(0, len(hidden), product.tokens):
            part = slice(start, start + product.tokens)
            logits = product(states[part])
            chunk = tokens.chunk(hidden, part)
            if gradients is None:
                losses.append(token_losses(loss, logits, chunk))
                continue
            found, of_logits, of_hidden = _differentiate(loss, logits, chunk, relative[part])
            losses.append(found)
            gradients.add(part, of_logits, of_hidden)
    return reduce_losses(torch.cat(losses), weights), gradients


def _differentiate(
    loss: TokenLoss, logits: Tensor, chunk: Tokens, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses `(C,)` of a chunk, and the gradients of their weighted sum to logits and hidden states."""
    if type(loss) is CrossEntropy:
        return loss.differentiate(logits, chunk.targets, weights), logits, None
    inputs = logits.requires_grad_(), chunk.hidden.detach().requires_grad_()
    with torch.enable_grad():
        losses = token_losses(loss, logits, replace(chunk, hidden=inputs[1]))
        of_logits, of_hidden = torch.autograd.grad(losses, inputs, weights.to(losses), allow_unused=True)
    return losses.detach(), torch.zeros_like(logits) if of_logits is None else of_logits, of_hidden
