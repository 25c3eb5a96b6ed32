"""Roofline lower bounds: device ceilings and the minimum FLOPs and bytes of a workload.

`python -m benchmarks.floor` measures the ceilings of this CPU and prints the share of its floor that each part of the
engine reaches: the tower, prefill, and decoding by batch size, in bfloat16 and float32. Ceilings and parts take turns,
and the best times count. Exits with status 1 below the targets in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.synthetic import Size
from llava.engine import load_engine
from llava.engine.cache import KVCache
from llava.engine.prefix_cache import PrefixCache, PrefixMatch
from llava.engine.sequence import hash_image
from llava.train.flops import Shape, Trainable, step_flops
from tests.tiny import make_chat, make_clip_tower

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


@dataclass(frozen=True)
class Stage:
    """A part of the engine's work, its floor, and the least share of the floor it must reach."""

    name: str
    work: Callable[[], object]
    cost: Cost
    target: float


def make_engine(root: Path, dtype: torch.dtype, quick: bool) -> tuple[Any, Shape]:
    """An engine without caches, of random weights: CLIP at 336 px and LLaMA, and its shape."""
    width, layers, words = (64, 2, 512) if quick else (768, 8, 32000)
    tower_width, tower_layers, pixels = (64, 3, 56) if quick else (512, 12, 336)
    tower = make_clip_tower(root / "tower", hidden_size=tower_width, intermediate_size=4 * tower_width,
                            num_hidden_layers=tower_layers, num_attention_heads=tower_width // 64,
                            image_size=pixels)  # fmt: skip
    middle = width * 8 // 3 // 64 * 64
    chat = make_chat(root / "chat", tower, vocab_size=words, hidden_size=width, intermediate_size=middle,
                     num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
                     mm_hidden_size=tower_width, mm_vision_image_size=pixels, mm_vision_select_layer=-2,
                     max_position_embeddings=2048)  # fmt: skip
    engine = load_engine(chat, device="cpu", dtype=str(dtype).removeprefix("torch."), feature_cache_bytes=0)
    tokens = (pixels // 14) ** 2
    shape = Shape(width, middle, layers, width // 64, width // 64, words, tower_hidden=tower_width,
                  tower_intermediate=4 * tower_width, tower_layers=tower_layers - 1, tower_positions=tokens + 1,
                  image_tokens=tokens)  # fmt: skip
    return engine, shape


def stages(engine: Any, shape: Shape, itemsize: int) -> list[Stage]:
    """Tower of 1 and 8 images; prefill of prompts with an image and of questions behind one; decode steps."""
    runner, image, words = engine.model_runner, shape.image_tokens, 64
    images = [hash_image(torch.randn(3, *[round(image**0.5) * 14] * 2)) for _ in range(8)]
    node = PrefixCache(2**40).insert(
        (), tuple(range(image)), [1] * image, runner.prefill_kv(runner.embed([7] * image), ())
    )
    found = [
        Stage(f"tower, {count} images", lambda count=count: engine.features.encode(images[:count]),  # type: ignore[misc]
              tower_cost(shape, count, itemsize=itemsize), 0.55)
        for count in (1, 8)
    ]  # fmt: skip

    def prefill(rows: int, tokens: int, shared: int) -> Stage:
        prefix = (PrefixMatch(node, image),) if shared else ()
        embeds = [runner.embed([9 + row] * tokens) for row in range(rows)]
        cost = prefill_cost(shape, tokens, rows, shared=shared, itemsize=itemsize)
        name = f"prefill, {rows} x {tokens} tokens" + (f" behind {shared}" if shared else "")
        return Stage(name, lambda: runner.logits(runner.prefill(embeds, [prefix] * rows)[1]), cost, 0.55)

    def decode(rows: int, shared: int) -> Stage:
        prefix, own = ((PrefixMatch(node, image),), words) if shared else ((), image + words)
        embeds = [runner.embed([9 + row] * own) for row in range(rows)]
        cache = KVCache(runner.spec)
        cache.join(runner.prefill(embeds, [prefix] * rows)[0], [own] * rows, [prefix] * rows)

        def step() -> None:
            runner.decode([5] * rows, cache)
            cache.end -= 1  # take the step back
            cache.lengths = [own] * rows

        cost = decode_cost(shape, rows, own, shared, itemsize=itemsize)
        return Stage(f"decode, {rows} rows" + (" of one image" if shared else ""), step, cost, 0.7)

    found += [prefill(1, image + words, 0), prefill(8, image + words, 0), prefill(16, words // 2, image)]
    return [*found, decode(1, 0), decode(8, 0), decode(8, image), decode(16, image), decode(32, image)]


@torch.inference_mode()
def measure(dtype: torch.dtype, turns: int, quick: bool) -> bool:
    """Print a line per stage; true if all targets are reached."""
    with tempfile.TemporaryDirectory() as folder:
        engine, shape = make_engine(Path(folder), dtype, quick)
        parts = stages(engine, shape, dtype.itemsize)
        best = dict.fromkeys((part.name for part in parts), float("inf"))
        peak = Peaks(0, 0)
        for _ in range(turns):
            for part in parts:
                best[part.name] = min(best[part.name], *(_seconds(part.work) for _ in range(3)))
            now = peaks(dtype, 64 if quick else 2048, 3)
            peak = Peaks(max(peak.operations, now.operations), max(peak.read, now.read))
    name = str(dtype).removeprefix("torch.")
    print(f"| {name}: {peak.operations / 1e12:.2f} TFLOP/s, {peak.read / 1e9:.1f} GB/s | | | |", flush=True)
    reached = True
    for part in parts:
        floor = part.cost.seconds(Ceilings(peak.operations, peak.read, peak.read))
        share = floor / best[part.name]
        reached &= share >= part.target
        print(f"| {name}, {part.name} | {1000 * floor:.2f} ms | {1000 * best[part.name]:.2f} ms | {share:.0%} |")
    return reached


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks that it runs, measures nothing")
    args = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads\n\n| part | floor | time | share |\n|---|---|---|---|")
    reached = [measure(dtype, args.turns, args.quick) for dtype in (torch.bfloat16, torch.float32)]
    return 0 if args.quick or reached[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
