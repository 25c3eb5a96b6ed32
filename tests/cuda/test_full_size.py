"""Vicuna-7B with InternViT-6B on a fake GPU: launches, operations and bytes of the engine.

Tensors have shapes but no values (`tests.cuda.fake_card`), so the full-size model runs in seconds and without memory.
The counts are what torch would launch on a GPU of compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counting import OpCounter
from benchmarks.floor import H200, decode_cost, prefill_cost, prefill_traffic, tower_cost, tower_traffic
from benchmarks.full_size import make_model
from llava.engine.cache import KVCache
from llava.engine.features import FeatureEncoder
from llava.engine.llama import LlamaRunner
from llava.engine.logits import TokenTable, token_logprobs
from llava.engine.prefix_cache import Node, PrefixMatch
from llava.engine.sampling import Sampler
from llava.engine.sequence import HashedImage, SamplingParams
from llava.train.flops import Shape, Trainable, shape_of, step_flops
from tests.cuda.fake_card import fake_card

ROWS = 16
OWN = 701  # tokens of a row after the step: an image of 336 px, text, an answer; no multiple of 16
EVEN = [OWN - 1] * ROWS
MIXED = [*EVEN[1:], 600]  # a row that is shorter than the others needs a mask
PREFIXES = (640, 104)  # tokens of two prefixes shared by all rows
HAS_FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")  # torch 2.9; before, a norm takes six kernels

pytestmark = pytest.mark.skipif(not HAS_FUSED_NORM, reason="this torch has no fused rms_norm kernel")


@dataclass
class Card:
    """The full model on the fake GPU."""

    mode: FakeTensorMode
    runner: LlamaRunner
    shape: Shape
    counted: dict[tuple[tuple[int, ...], tuple[int, ...]], OpCounter] = field(default_factory=dict)

    @contextmanager
    def counting(self) -> Iterator[OpCounter]:
        with self.mode, torch.inference_mode(), OpCounter("cuda") as counter:
            yield counter

    def empty(self, *shape: int) -> Tensor:
        with self.mode:
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    def match(self, tokens: int) -> PrefixMatch:
        data = self.runner.spec.empty(1, tokens)[:, :, 0]
        return PrefixMatch(Node(tuple(range(tokens)), tuple(range(tokens + 1)), data), tokens)

    def decode(self, lengths: list[int], prefixes: tuple[int, ...]) -> OpCounter:
        """A step of rows with `lengths` own cached tokens after the prefixes; counted once."""
        key = tuple(lengths), prefixes
        if key not in self.counted:
            with self.mode, torch.inference_mode():
                cache, prefix = KVCache(self.runner.spec), tuple(map(self.match, prefixes))
                cache.join(self.runner.spec.empty(len(lengths), max(lengths)), lengths, [prefix] * len(lengths))
                cache.make_room()
            with self.counting() as self.counted[key]:
                assert self.runner.decode([5] * len(lengths), cache).shape == (len(lengths), self.shape.vocabulary)
        return self.counted[key]

    def prefill(self, lengths: list[int]) -> OpCounter:
        rows = [self.empty(length, self.shape.hidden) for length in lengths]
        with self.counting() as counter:
            _, states = self.runner.prefill(rows, [()] * len(rows))
            assert self.runner.logits(states).shape == (len(rows), self.shape.vocabulary)
        return counter

    def encode(self, images: int, pixels: int) -> OpCounter:
        encoder = FeatureEncoder(self.runner.model, None, aspect_ratio=None, budget=0)
        shown = [HashedImage(bytes([image]), self.empty(3, pixels, pixels)) for image in range(images)]
        with self.mode, torch.inference_mode():
            encoder.encode(shown[:1])  # resamples the position table, once per size
        with self.counting() as counter:
            features = encoder.encode(shown)
        assert {found.shape for found in features.values()} == {((pixels // 14) ** 2, self.shape.hidden)}
        return counter


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    with pytest.MonkeyPatch.context() as patch:
        mode = fake_card(patch)
        with mode:
            model = make_model("cuda").requires_grad_(False)
            runner = LlamaRunner(model)
        yield Card(mode, runner, shape_of(model.config, model.get_vision_tower()))


def close(expected: float, share: float) -> object:
    return pytest.approx(expected, rel=share)


def skipped(shape: Shape, rows: int, tokens: int) -> float:
    """Operations saved in the last layer of a prefill, which only the last token of each row runs in full."""
    after_attention = shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    return rows * (tokens - 1) * (2 * after_attention + 2 * shape.hidden * tokens)


def test_weights_take_the_memory_of_16_bits(card: Card) -> None:
    weights = list(card.runner.model.parameters())
    assert {(weight.dtype, weight.device.type) for weight in weights} == {(torch.bfloat16, "cuda")}
    assert sum(weight.nbytes for weight in weights) == close(24.5e9, 0.005)


@pytest.mark.parametrize("lengths", [EVEN, MIXED], ids=["even", "mixed"])
@pytest.mark.parametrize(("count", "most"), [(0, 520), (1, 710), (2, 905)])
def test_launches_of_a_decode_step(card: Card, lengths: list[int], count: int, most: int) -> None:
    """Each budget is too small for one more operator per layer."""
    counter = card.decode(lengths, PREFIXES[:count])
    assert counter.launches <= most, counter.table(20)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_decode_step_computes_and_reads_what_its_floor_says(card: Card, count: int) -> None:
    counter, prefixes = card.decode(EVEN, PREFIXES[:count]), PREFIXES[:count]
    floor = decode_cost(card.shape, ROWS, OWN, sum(prefixes))
    assert counter.flops == close(floor.flops, 0.001)
    assert counter.bytes == close(floor.bytes, 0.02)
    assert floor.seconds(H200) >= 0.98 * counter.seconds(H200)


@pytest.mark.parametrize(("fields", "most"), [({}, 40), ({"top_k": 20, "repetition_penalty": 1.1, "logprobs": 5}, 75)])
def test_sampling_stays_on_the_device(card: Card, fields: dict[str, Any], most: int) -> None:
    """Rows are sampled together: as many launches for sixteen as for two, and no synchronisation."""
    launches = []
    for rows in (2, ROWS):
        params = [SamplingParams(8, temperature=0.7, top_p=0.9, **fields)] * rows
        sampler = Sampler(params, [torch.Generator()] * rows, [TokenTable.build(one, range(9)) for one in params])
        columns = [torch.as_tensor(column) for column in sampler.host_params()]
        with card.mode, OpCounter("cuda") as counter:
            sampler.set_device_params([torch.empty(one.shape, dtype=one.dtype, device="cuda") for one in columns])
            logits = card.empty(rows, card.shape.vocabulary)
            tokens = sampler.sample(logits)
            assert tokens.shape == (rows,)
            if sampler.num_logprobs is not None:
                assert token_logprobs(logits, tokens, sampler.num_logprobs).shape == (rows, 11)
        launches.append(counter.launches)
    assert launches[0] == launches[1] <= most


@pytest.mark.parametrize(("rows", "tokens"), [(1, 640), (1, 1088), (4, 640)])
def test_a_prefill_computes_what_its_floor_says(card: Card, rows: int, tokens: int) -> None:
    counter, floor = card.prefill([tokens] * rows), prefill_cost(card.shape, tokens, rows)
    assert counter.flops == close(floor.flops - skipped(card.shape, rows, tokens), 0.002)
    forward = step_flops(
        card.shape, Trainable(False, False), tokens=rows * tokens, length=tokens, images=0, supervised=rows
    ) / 2  # fmt: skip
    assert floor.flops == close(forward, 0.002)
    assert counter.bytes == close(prefill_traffic(card.shape, tokens, rows), 0.02)


def test_a_prefill_is_bound_by_its_products(card: Card) -> None:
    counter, floor = card.prefill([640]), prefill_cost(card.shape, 640)
    assert counter.launches <= 515, counter.table(20)
    assert floor.seconds(H200) >= 0.87 * counter.seconds(H200), counter.table(20)


def test_rows_of_mixed_length_need_few_launches_more(card: Card) -> None:
    """No index has a size known only to the device: fake tensors would fail."""
    counter = card.prefill([640, 500, 64])
    assert counter.launches <= 615, counter.table(20)


@pytest.mark.parametrize(("images", "pixels"), [(1, 336), (16, 336), (1, 448)])
def test_the_tower_computes_what_its_floor_says(card: Card, images: int, pixels: int) -> None:
    patches = (pixels // 14) ** 2
    shape = replace(card.shape, tower_positions=patches + 1, image_tokens=patches)
    counter, floor = card.encode(images, pixels), tower_cost(shape, images)
    assert counter.flops == close(floor.flops, 0.002)
    learns = Trainable(False, False)
    forward = step_flops(shape, learns, tokens=0, length=0, images=images, supervised=0)
    projector = 2 * shape.projector_weights * patches * images  # which the step counts with its gradients
    assert floor.flops == close(forward - 2 * projector, 0.002)
    assert counter.bytes == close(tower_traffic(shape, images), 0.02)


def test_the_tower_is_bound_by_its_products(card: Card) -> None:
    counter, floor = card.encode(1, 336), tower_cost(card.shape)
    assert counter.launches <= 775, counter.table(20)  # 728, and 45 copies of contexts in torch 2.11
    assert floor.seconds(H200) >= 0.87 * counter.seconds(H200), counter.table(20)
