"""Roofline lower bounds: device ceilings and the minimum FLOPs and bytes of a workload."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.synthetic import Size
from llava.train.flops import Shape, Trainable, step_flops

PATCH_PIXELS: Final = 3 * 14 * 14  # of the patch embedding


@dataclass(frozen=True)
class Ceilings:
    """Dense 16-bit FLOP/s, bytes per second of device memory, and bytes per second from the host."""

    flops: float
    bandwidth: float
    pcie: float


H200: Final = Ceilings(788e12, 4.3e12, 55e9)  # measured on an H200; the host link is estimated for PCIe 5.0 x16
# 80 GB. Estimates, derated from the data sheet, which says 312 TFLOP/s and 2.0 TB/s.
A100: Final = Ceilings(270e12, 1.8e12, 25e9)


@dataclass(frozen=True)
class Cost:
    """Minimum FLOPs (two per multiply-add) and minimum bytes of device memory read or written."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Time at the ceilings, with compute and memory traffic overlapped."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.bytes * factor)


def tower_cost(shape: Shape, images: float = 1, *, itemsize: int = 2) -> Cost:
    """Vision tower and projector over a batch of images; the bytes exclude activations between layers."""
    positions, width = shape.tower_positions, shape.tower_hidden
    layer = 2 * (4 * width**2 + 2 * width * shape.tower_intermediate) + 4 * width * positions  # per token
    embedding = 2 * PATCH_PIXELS * width * (positions - 1)
    projector = 2 * shape.projector_weights * shape.image_tokens
    flops = images * (positions * shape.tower_layers * layer + embedding + projector)
    return Cost(flops, (shape.tower_weights + shape.projector_weights) * itemsize)


def prefill_cost(shape: Shape, tokens: float, rows: float = 1, *, shared: float = 0, itemsize: int = 2) -> Cost:
    """Prefill of `rows` prompts of `tokens` tokens each after `shared` cached tokens, with logits of the last token.

    Every layer counts for every token, as in the usual model FLOPs. An engine that computes only the last token in the
    last layer's MLP saves up to 1 / layers of this.
    """
    weights, head = shape.layers * shape.layer_weights, shape.vocabulary * shape.hidden
    attention = 4 * shape.layers * shape.hidden * (shared + tokens / 2)  # per token
    flops = rows * (tokens * (2 * weights + attention) + 2 * head)
    key_values = (rows * tokens + shared) * column_bytes(shape, itemsize)
    return Cost(flops, _read_weights(shape) * itemsize + key_values)


def prefill_traffic(shape: Shape, tokens: float, rows: float = 1, *, itemsize: int = 2) -> float:
    """Bytes a prefill of `rows` rows of `tokens` tokens moves if every operator reads its inputs from device memory and
    writes its outputs there: the weights, and the activations between the operators.

    Per token and layer, in elements (hidden h, intermediate i, keys k): norm 2h, product of q, k and v 2h + 2k, rotary
    embedding 9 (h + k), attention 2h + 2k; then product o 2h, norm 2h, the two residual additions together 6h, products
    gate and up h + 2i, SiLU 2i, multiplication 3i, product down i + h. The last layer runs the second half for the last
    token only.
    """
    hidden, middle, key_value = shape.hidden, shape.intermediate, shape.key_value
    rotated = hidden + key_value
    before = 2 * hidden + 2 * rotated + 9 * rotated + 2 * rotated
    after = 12 * hidden + 8 * middle
    layers = shape.layers * before + (shape.layers - 1 + 1 / tokens) * after
    return (_read_weights(shape) + rows * tokens * layers) * itemsize


def tower_traffic(shape: Shape, images: float = 1, *, itemsize: int = 2) -> float:
    """Bytes the tower and projector move if every operator reads its inputs from device memory and writes its
    outputs there: the bytes of `tower_cost`, and the activations between the operators.

    Per position and layer, in elements: two norms and those of q and k (4 · 2w, and 2 · 2w to make q and k contiguous),
    the products (w + 3w, 2w, w + m, m + w), attention (4w), GELU (2m), two layer scales (2 · 2w) and two residual
    additions (2 · 3w).
    """
    width, middle = shape.tower_hidden, shape.tower_intermediate
    layer = 12 * width + 8 * width + 2 * middle + 4 * width + 2 * middle + 4 * width + 6 * width
    projector = width + 5 * shape.hidden  # two products with GELU in between
    elements = shape.tower_positions * shape.tower_layers * layer + shape.image_tokens * projector
    return tower_cost(shape, images, itemsize=itemsize).bytes + images * elements * itemsize


def decode_cost(shape: Shape, rows: float, own: float, shared: float = 0, *, itemsize: int = 2) -> Cost:
    """A decode step of `rows` rows, each with `own` cached tokens after a prefix of `shared` tokens common to all rows.

    Weights and the shared prefix are read once for all rows; the embedding contributes one vector per row.
    """
    weights = _read_weights(shape)
    attention = 4 * shape.layers * shape.hidden * (own + shared)
    key_values = (rows * own + shared) * column_bytes(shape, itemsize)
    return Cost(rows * (2 * weights + attention), weights * itemsize + key_values)


def column_bytes(shape: Shape, itemsize: int = 2) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * shape.layers * shape.key_value * itemsize


def _read_weights(shape: Shape) -> int:
    """Parameters of the layers and the head, which are read entirely, unlike the embedding."""
    return shape.layers * shape.layer_weights + shape.vocabulary * shape.hidden


def load_cost(size: float, ceilings: Ceilings) -> float:
    """Seconds to copy `size` bytes of weights from the host."""
    return size / ceilings.pcie


def train_cost(
    shape: Shape,
    learns: Trainable,
    *,
    tokens: float,
    length: float,
    images: float,
    supervised: float,
    recompute: bool = False,
    itemsize: int = 2,
) -> Cost:
    """A training step over `tokens` positions; `recompute` adds the second forward of gradient checkpointing.

    The bytes are one read of the weights per pass; they exclude gradients and optimizer states.
    """
    batch = {"tokens": tokens, "length": length, "images": images, "supervised": supervised}
    flops = step_flops(shape, learns, **batch)
    if recompute:
        frozen = Trainable(language=False, projector=False)  # its language part is a forward and one backward matmul
        flops += (step_flops(shape, frozen, **{**batch, "images": 0, "supervised": 0})) / 2
    passes = 2 + learns.language + recompute
    return Cost(flops, (passes * _read_weights(shape) + shape.tower_weights + 3 * shape.projector_weights) * itemsize)


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
    """Minimum work for one image with its questions: tokens per stage.

    `prefix` is system prompt and image, once; `own` all tokens of the questions that are nowhere else; `answers` the
    questions; `steps` the decode steps after the first token, each reading all weights once for the whole batch.
    """

    prefix: int
    own: int
    answers: int
    steps: float
    new_tokens: int


def phase_seconds(shape: Shape, work: Work, ceilings: Ceilings, *, itemsize: int = 2) -> dict[str, float]:
    """Seconds per image with its questions at the ceilings, by phase."""
    tokens = work.new_tokens - 1  # the first comes from the prefill
    together = decode_cost(shape, work.answers, work.own / work.answers, work.prefix, itemsize=itemsize) * tokens
    phases = {
        "tower": tower_cost(shape, itemsize=itemsize),
        "prefix": prefill_cost(shape, work.prefix, itemsize=itemsize),
        "questions": prefill_cost(shape, work.own / work.answers, work.answers, shared=work.prefix, itemsize=itemsize),
        "decoding": together + Cost(0, (work.steps - tokens) * _read_weights(shape) * itemsize),
    }
    return {name: cost.seconds(ceilings) for name, cost in phases.items()}


def answers_seconds(shape: Shape, work: Work, ceilings: Ceilings, *, itemsize: int = 2) -> float:
    """Seconds per image with its questions at the ceilings; phases run one after another."""
    return sum(phase_seconds(shape, work, ceilings, itemsize=itemsize).values())


def floor_seconds(size: Size, work: Work, peak: Peaks, dtype: torch.dtype) -> float:
    """Seconds per image with its questions at the measured peaks, for the synthetic model of this size."""
    tokens = (size.pixels // 14) ** 2
    shape = Shape(
        size.width, size.width * 8 // 3 // 64 * 64, size.layers, size.width // 64, size.width // 64, size.vocabulary,
        tower_hidden=size.tower_width, tower_intermediate=4 * size.tower_width, tower_layers=size.tower_layers - 3,
        tower_positions=tokens + 1, image_tokens=tokens,
    )  # fmt: skip
    return answers_seconds(shape, work, Ceilings(peak.operations, peak.read, peak.read), itemsize=dtype.itemsize)


def decode_floor(model: torch.nn.Module, peak: Peaks) -> float:
    """Seconds a token of one stream takes if every weight is read once (a tied embedding once, an untied one never)."""
    head = model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    unread = 0 if embedding is head else embedding.nbytes
    return (sum(parameter.nbytes for parameter in model.parameters()) - unread) / peak.read
