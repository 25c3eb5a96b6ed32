"""What the machine allows: measured peaks, and the operations and bytes that a workload cannot do without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.synthetic import Size


@dataclass(frozen=True)
class Peaks:
    """Multiply-adds count as two operations; `read` is bytes per second of a matrix times a vector."""

    operations: float
    read: float


def peaks(dtype: torch.dtype, width: int = 2048, repeats: int = 10) -> Peaks:
    """The best of several tries: a square product of `width`, and a vector times a matrix 32 times as tall."""
    tall, vector = torch.randn(32 * width, width).to(dtype), torch.randn(width).to(dtype)
    square = tall[:width]
    product = min(_seconds(lambda: square @ square) for _ in range(repeats))
    reading = min(_seconds(lambda: torch.mv(tall, vector)) for _ in range(repeats))
    return Peaks(2 * width**3 / product, tall.nbytes / reading)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """What one picture with its questions needs at least: tokens by the stage they pass through.

    `prefix` is system prompt and picture, once; `own` all tokens of the questions that are nowhere else; `answers` the
    questions; `steps` the decode steps after the first token, each reading all weights once for the whole batch.
    """

    prefix: int
    own: int
    answers: int
    steps: float
    new_tokens: int


def floor_seconds(size: Size, work: Work, peak: Peaks, dtype: torch.dtype) -> float:
    """Seconds a picture with its questions takes at the peaks, caches and every overhead left out."""
    tokens = (size.pixels // 14) ** 2 + 1
    tower = size.tower_layers - 3  # select layer -4
    tower_ops = tower * (24 * tokens * size.tower_width**2 + 4 * tokens**2 * size.tower_width)
    projector_ops = 2 * (tokens - 1) * (size.tower_width * size.width + size.width**2)
    intermediate = size.width * 8 // 3 // 64 * 64
    layer = 4 * size.width**2 + 3 * size.width * intermediate
    weights = size.layers * layer
    passed = work.prefix + work.own
    attention = 4 * size.layers * size.width * (work.prefix**2 / 2 + work.own * work.prefix)
    head = size.vocabulary * size.width
    prefill_ops = 2 * passed * weights + attention + 2 * work.answers * head
    decode_ops = 2 * work.answers * (work.new_tokens - 1) * (weights + head)
    decode_bytes = work.steps * (weights + head) * dtype.itemsize
    decode = max(decode_ops / peak.operations, decode_bytes / peak.read)
    return (tower_ops + projector_ops + prefill_ops) / peak.operations + decode


def decode_floor(model: torch.nn.Module, peak: Peaks) -> float:
    """Seconds a token of one stream takes if every weight is read once (a tied embedding once, an untied one never)."""
    head = model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    unread = 0 if embedding is head else embedding.nbytes
    return (sum(parameter.nbytes for parameter in model.parameters()) - unread) / peak.read
