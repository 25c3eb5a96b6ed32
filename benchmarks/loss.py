"""The loss of 2,048 tokens over 32,000 words in chunks, against a table of logits: `python -m benchmarks.loss`.

Both ways compute forward and backward pass of head and loss, alternately in one process, and each once in a process of
its own for its peak memory (weights and their `.grad` excluded). The losses and gradients of both in float32 are
compared with float64. The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import measure, resident_mib
from benchmarks.memory import M_MMAP_THRESHOLD, peak_since_reset, reset_peak
from llava.model.language_model.lm_head import LMHead, supervised_loss
from llava.model.language_model.loss import CrossEntropy, Tokens

MEMORY, TIME, LOSS_ERROR, GRADIENT_ERROR = 0.25, 1.0, 1e-6, 1e-5  # targets
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(dtype: torch.dtype, tokens: int, words: int, width: int, *, frozen: bool = False) -> tuple[LMHead, Tokens]:
    """A head and supervised tokens whose logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        head = LMHead(width, words, bias=False)
    weight = torch.randn(words, width, generator=generator).mul_(2 * width**-0.5).to(dtype)
    head.weight = torch.nn.Parameter(weight, requires_grad=not frozen)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(words, (tokens,), generator=generator)
    return head, Tokens(hidden, targets, torch.zeros_like(targets), torch.arange(tokens))


def by_table(head: LMHead, tokens: Tokens) -> Tensor:
    """All logits, then their cross-entropy in float32 (float64 for float64)."""
    logits = head(tokens.hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, tokens.targets, reduction="sum") / len(tokens.targets)


def in_chunks(head: LMHead, tokens: Tokens) -> Tensor:
    return supervised_loss(head, tokens, None, CrossEntropy())


WAYS: dict[str, Callable[[LMHead, Tokens], Tensor]] = {"table": by_table, "chunks": in_chunks}


def gradients(way: str, head: LMHead, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of the hidden states and, unless it is frozen, of the weight."""
    loss = WAYS[way](head, tokens)
    loss.backward()
    return loss.detach(), [one.grad for one in (tokens.hidden, head.weight) if one.grad is not None]


def peak(way: str, kind: str, tokens: int, words: int, width: int, frozen: bool) -> float:
    """MiB that one forward and backward pass adds at its peak.

    A smaller pass loads the libraries first. Large blocks are returned to the system when freed.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    gradients(way, *make(KINDS[kind], tokens // 8, words // 16, width))
    head, given = make(KINDS[kind], tokens, words, width, frozen=frozen)
    for one in (given.hidden, head.weight):
        one.grad = torch.zeros_like(one) if one.requires_grad else None
    before = resident_mib()
    reset_peak()
    gradients(way, head, given)
    return peak_since_reset() - before


def seconds(kind: str, turns: int, sizes: Sequence[int], frozen: bool) -> dict[str, float]:
    """The median time of each way, in turns."""
    head, given = make(KINDS[kind], *sizes, frozen=frozen)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(-1, turns):  # the first is not counted
        for way, times in found.items():
            given.hidden.grad = head.weight.grad = None
            start = time.perf_counter()
            gradients(way, head, given)
            if turn >= 0:
                times.append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in found.items()}


def errors(kind: str, way: str, sizes: Sequence[int]) -> tuple[float, float]:
    """Relative errors against float64: of the loss, and the largest of a gradient (its norm)."""
    head, given = make(KINDS[kind], *sizes)
    exact, same = make(torch.float64, *sizes)
    exact.weight.data, same.hidden.data = head.weight.data.double(), given.hidden.data.double()
    expected, right = gradients("table", exact, same)
    loss, found = gradients(way, head, given)
    far = [((one.double() - other).norm() / other.norm()).item() for one, other in zip(found, right, strict=True)]
    return abs(loss.item() / expected.item() - 1), max(far)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0].startswith("{"):  # the process that measures memory
        print(json.dumps({"peak_mib": peak(**json.loads(words[0]))}))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--words", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(words)
    sizes, missed = (args.tokens, args.words, args.width), False
    for frozen in (False, True):
        for kind in KINDS:
            case = {"kind": kind, "tokens": args.tokens, "words": args.words, "width": args.width, "frozen": frozen}
            memory = {way: measure("benchmarks.loss", way=way, **case)["peak_mib"] for way in WAYS}
            times = seconds(kind, args.turns, sizes, frozen)
            ratios = [figures["chunks"] / figures["table"] for figures in (memory, times)]
            missed |= ratios[0] > MEMORY or ratios[1] > TIME
            print(
                f"{kind}, head {'frozen' if frozen else 'trained'}: peak {memory['table']:.0f} and "
                f"{memory['chunks']:.0f} MiB, ratio {ratios[0]:.2f} (target {MEMORY}); time {times['table']:.2f} and "
                f"{times['chunks']:.2f} s, ratio {ratios[1]:.2f} (target {TIME})",
                flush=True,
            )
    for kind in KINDS:
        for way in WAYS:
            loss, gradient = errors(kind, way, sizes)
            missed |= (kind, way) == ("float32", "chunks") and (loss > LOSS_ERROR or gradient > GRADIENT_ERROR)
            print(f"{kind}, {way}: relative error of the loss {loss:.1e}, of the gradients {gradient:.1e}", flush=True)
    print(f"targets in float32: {LOSS_ERROR} and {GRADIENT_ERROR}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
