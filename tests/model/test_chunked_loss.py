"""Cross-entropy in chunks equals the table of logits, in every dtype, without the table."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.errors import ConfigError
from llava.model.language_model import lm_head
from llava.model.language_model.lm_head import LMHead, supervised_loss
from llava.model.language_model.loss import CrossEntropy, TokenLoss, Tokens

WIDTH, WORDS, CHUNK = 6, 11, 4  # CHUNK tokens a chunk in float32
PLAIN, BOTH = CrossEntropy(), CrossEntropy(label_smoothing=0.1, z_loss=0.01)


def repelled(logits: Tensor, targets: Tensor, tokens: Tokens) -> Tensor:
    """A loss that autograd differentiates, also by the hidden states."""
    return F.cross_entropy(logits, targets, reduction="none").square() + tokens.hidden.square().mean(-1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", CHUNK * WORDS * 4)
    monkeypatch.setattr(lm_head, "BLOCK_BYTES", 3 * WIDTH * 4)


def make(count: int, dtype: torch.dtype = torch.float64, *, bias: bool = False) -> tuple[LMHead, Tokens]:
    generator = torch.Generator().manual_seed(count)
    head = LMHead(WIDTH, WORDS, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(WORDS, (count,), generator=generator)
    rows = torch.arange(count) // 2
    return head, Tokens(hidden, targets, rows, torch.arange(count) % 2)


def table_loss(head: LMHead, tokens: Tokens, row_weights: Tensor | None, loss: TokenLoss) -> Tensor:
    """The same by the table of all logits."""
    each = loss(F.linear(tokens.hidden, head.weight, head.bias), tokens.targets, tokens)
    if row_weights is None:
        return each.sum() / max(1, len(each))
    return (each * row_weights[tokens.rows]).sum()


def compare(head: LMHead, tokens: Tokens, found: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, expected, **tolerance)
    inputs = [tokens.hidden, *head.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(3 * value, inputs) for value in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("loss", [PLAIN, CrossEntropy(label_smoothing=0.2), CrossEntropy(z_loss=0.1), BOTH, repelled])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, CHUNK // 2, CHUNK // 2 + 1, 3 * CHUNK + 1])
def test_the_table_of_logits(count: int, bias: bool, weighted: bool, loss: TokenLoss) -> None:
    head, tokens = make(count, bias=bias)
    weights = torch.rand(count // 2 + 1, dtype=torch.float64) - 0.3 if weighted else None
    found = supervised_loss(head, tokens, weights, loss)
    compare(head, tokens, found, table_loss(head, tokens, weights, loss), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(head, tokens, weights, loss), found)


def test_float32() -> None:
    head, tokens = make(3 * CHUNK, torch.float32)
    compare(head, tokens, supervised_loss(head, tokens, None, BOTH), table_loss(head, tokens, None, BOTH))


def test_weights_of_zero_are_a_loss_of_zero() -> None:
    head, tokens = make(CHUNK, torch.float32)
    supervised_loss(head, tokens, torch.zeros(CHUNK), PLAIN).backward()
    assert tokens.hidden.grad is not None and not tokens.hidden.grad.any() and not head.weight.grad.any()


class Repeatable(torch.autograd.Function):
    """A loss of hidden states, weight and bias whose backward pass can run more than once, as gradcheck runs it."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Tensor) -> Tensor:
        ctx.function, ctx.inputs = function, [value.detach().requires_grad_() for value in inputs]
        return function(*inputs)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*ctx.inputs), ctx.inputs, upstream)


@pytest.mark.parametrize("loss", [PLAIN, BOTH, repelled])
def test_gradients_are_derivatives(loss: TokenLoss) -> None:
    head, tokens = make(CHUNK + 1, bias=True)
    weights = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)[tokens.rows]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total: Tensor = lm_head._ChunkedLoss.apply(hidden, weight, bias, replace(tokens, hidden=hidden), weights, loss)
        return total

    inputs = tokens.hidden, head.weight, head.bias
    assert torch.autograd.gradcheck(lambda *given: Repeatable.apply(function, *given), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [True, False])
def test_16_bits(dtype: torch.dtype, masters: bool) -> None:
    """Small weights and a gradient scaler's large factor: gradients neither vanish nor overflow."""
    head, tokens = make(5 * CHUNK, torch.float32 if masters else dtype)
    weights = torch.full((5 * CHUNK,), 1e-7)
    scale = 2.0**16
    with torch.autocast("cpu", dtype, enabled=masters):
        total = supervised_loss(head, tokens, weights, PLAIN)
    assert total.dtype == torch.float32
    (scale * total).backward()
    exact, same = make(5 * CHUNK)
    expected = table_loss(exact, same, weights.double(), PLAIN)
    (scale * expected).backward()
    torch.testing.assert_close(total.double(), expected, rtol=0.02, atol=0)
    for ours, theirs in ((tokens.hidden, same.hidden), (head.weight, exact.weight)):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.02


def test_the_weights_gradient_is_summed_in_float32() -> None:
    """One large gradient and 512 chunks of small ones, which bfloat16 would round away."""
    count = 512 * CHUNK
    head = LMHead(WIDTH, WORDS, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(head.weight)
    hidden = torch.ones(count, WIDTH, dtype=torch.bfloat16)
    hidden[CHUNK:] = 2.0**-8
    tokens = Tokens(hidden, torch.zeros(count, dtype=torch.long), *torch.zeros(2, count, dtype=torch.long))
    supervised_loss(head, tokens, torch.ones(1), PLAIN).backward()
    expected = -(1 - 1 / WORDS) * hidden.double().sum(0)
    torch.testing.assert_close(head.weight.grad[0].double(), expected, rtol=2.0**-6, atol=0)


class Largest(TorchDispatchMode):
    """The shapes of all tensors that operators return, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(one.shape) for one in tree_leaves(result) if isinstance(one, Tensor)}
        return result


@pytest.mark.parametrize("loss", [PLAIN, BOTH, repelled])
@pytest.mark.parametrize("trained", ["head and trunk", "head", "trunk"])
def test_no_table_and_no_gradient_that_is_not_needed(loss: TokenLoss, trained: str) -> None:
    count = 10 * CHUNK
    head, tokens = make(count, torch.float32)
    head.requires_grad_("head" in trained)
    tokens.hidden.requires_grad_("trunk" in trained)
    with Largest() as seen:
        supervised_loss(head, tokens, None, loss).backward()
    assert (CHUNK, WORDS) in seen.shapes
    assert max(math.prod(shape) for shape in seen.shapes) <= count * WIDTH < count * WORDS
    assert ((WORDS, WIDTH) in seen.shapes) == (head.weight.grad is not None) == ("head" in trained)
    assert ((count, WIDTH) in seen.shapes) == (tokens.hidden.grad is not None) == ("trunk" in trained)


def test_gradients_are_used_once() -> None:
    head, tokens = make(CHUNK)
    total = supervised_loss(head, tokens, None, PLAIN)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        total.backward()


@pytest.mark.parametrize("gradients", [True, False])
def test_a_loss_per_token_is_required(gradients: bool) -> None:
    head, tokens = make(CHUNK)
    with torch.set_grad_enabled(gradients), pytest.raises(ConfigError, match=r"one value per token, shape \(\d,\)"):
        supervised_loss(head, tokens, None, lambda logits, targets, tokens: F.cross_entropy(logits, targets))


def test_another_head_uses_the_table() -> None:
    head, tokens = make(CHUNK)
    other = torch.nn.Sequential(head)
    assert supervised_loss(other, tokens, None, PLAIN) == table_loss(head, tokens, None, PLAIN)
