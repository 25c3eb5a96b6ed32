"""The counters and floors of the benchmarks, against values computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException

from benchmarks import counting
from benchmarks.counting import OpCounter
from benchmarks.floor import (
    A100,
    H200,
    Ceilings,
    Cost,
    Work,
    answers_seconds,
    decode_cost,
    load_cost,
    prefill_cost,
    tower_cost,
    train_cost,
)
from benchmarks.full_size import FULL, QUICK, chat_config, make_engine, make_model
from llava.engine import Request, SamplingParams
from llava.model.multimodal_encoder.tower import VisionTower
from llava.train.flops import Shape, Trainable, shape_of
from tests.cuda.fake_card import fake_card

WIDE = 4  # bytes of a float32


def test_views_and_allocations_are_not_counted() -> None:
    x = torch.randn(6, 8)
    with OpCounter() as counter:
        x.t().view(2, 4, 6)[:1].unsqueeze(0).expand(3, 1, 4, 6).detach().split(2, dim=-1)
        x.reshape(-1).chunk(2)
        torch.empty(3), torch.empty_like(x), x.new_empty(2)
        assert x.shape == (6, 8) and x.device.type == "cpu"
    assert (counter.launches, counter.flops, counter.bytes, counter.ops) == (0, 0, 0, {})


def test_products_count_two_operations_a_multiply_add() -> None:
    x, weight, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)
    with OpCounter() as counter:
        F.linear(x, weight)
    assert (counter.launches, counter.flops, counter.bytes) == (1, 2 * 6 * 8 * 5, WIDE * (6 * 8 + 8 * 5 + 6 * 5))
    with counter:  # adds up
        F.linear(x, weight, bias)
        torch.mv(weight, x[0])
        torch.bmm(x.view(2, 3, 8), x.view(2, 8, 3))
    assert counter.flops == 2 * (6 * 8 * 5) + 2 * (6 * 8 * 5) + 2 * 8 * 5 + 2 * 2 * 3 * 8 * 3
    assert counter.ops == {"mm": 1, "addmm": 1, "mv": 1, "bmm": 1}
    assert "1  addmm" in counter.table(4) and len(counter.table(2).splitlines()) == 2


def test_convolution_and_attention() -> None:
    with OpCounter() as counter:
        F.conv2d(torch.randn(2, 3, 28, 28), torch.randn(8, 3, 14, 14), stride=14)
    assert counter.flops == 2 * 2 * (8 * 2 * 2) * (3 * 14 * 14)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    with OpCounter() as whole:
        F.scaled_dot_product_attention(q, k, v)
    with OpCounter() as causal:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert whole.flops == 2 * 2 * (2 * 3) * 5 * 7 * 8
    assert causal.flops == 2 * 2 * (2 * 3) * 5 * 5 * 8 // 2


def test_bytes_are_those_that_are_touched() -> None:
    x, ids, table = torch.randn(6, 8), torch.tensor([3, 1]), torch.randn(1000, 8)

    def bytes_of(work: object) -> int:
        with OpCounter() as counter:
            work()  # type: ignore[operator]
        assert counter.launches == 1, counter.table()
        return counter.bytes

    row = 8 * WIDE
    assert bytes_of(lambda: x + x) == 2 * 6 * row  # read once
    assert bytes_of(lambda: x[:2].mul_(x[2:4])) == 3 * 2 * row
    assert bytes_of(lambda: x.fill_(0)) == 6 * row
    assert bytes_of(lambda: x[:3].copy_(x[3:])) == 2 * 3 * row
    assert bytes_of(lambda: x.add(x[:1].expand(6, 8))) == (6 + 6 + 1) * row  # the expanded row is stored once
    assert bytes_of(lambda: F.embedding(ids, table)) == 2 * 2 * row + ids.nbytes
    assert bytes_of(lambda: table[ids]) == 2 * 2 * row + ids.nbytes
    assert bytes_of(lambda: table.index_put_((ids,), x[:2])) == 2 * 2 * row + ids.nbytes
    assert bytes_of(lambda: torch.mm(x, x.t(), out=table[:6, :6])) == (6 * row + 6 * row) + 6 * 6 * WIDE
    assert bytes_of(lambda: torch._foreach_add_([x, x[:1]], 1.0)) == 2 * (6 + 1) * row  # has no result


def test_time_is_bound_operator_by_operator() -> None:
    ceilings = Ceilings(flops=100.0, bandwidth=10.0, pcie=5.0)
    assert Cost(50, 1).seconds(ceilings) == 0.5 and Cost(50, 10).seconds(ceilings) == 1.0
    x = torch.randn(2, 64)
    with OpCounter() as counter:
        torch.mm(x, x.t())  # 512 operations, 1,040 bytes with one of two equal views counted twice
        x + x  # 1,024 bytes
    assert counter.seconds(ceilings) == pytest.approx(max(5.12, counter.bytes / 10 - 102.4) + 102.4)


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_fused_rms_norm"), reason="this torch has no fused rms_norm")
@pytest.mark.parametrize("built_for_cuda", [False, True])
def test_a_fused_norm_is_one_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch, built_for_cuda: bool) -> None:
    """Also with CPU-only builds of torch, which have no such kernel."""
    counting._is_composite.cache_clear()
    if built_for_cuda:  # then the dispatcher knows it
        if torch.version.cuda is None:
            pytest.skip("torch is built for the CPU only")
        monkeypatch.setattr(counting, "_FUSED", frozenset())
    with fake_card(monkeypatch), torch.inference_mode():
        x, weight = torch.empty(4, 16, device="cuda"), torch.empty(8, device="cuda")
        with OpCounter("cuda") as packed:
            F.rms_norm(x.view(8, 8), (8,), weight, 1e-6)
        with OpCounter("cuda") as strided:
            F.rms_norm(x[:, :8], (8,), weight, 1e-6)
    assert packed.ops == {"_fused_rms_norm": 1}
    assert strided.ops == {"_fused_rms_norm": 1, "clone": 1}  # the kernel packs the rows first
    with OpCounter() as counter:
        F.rms_norm(torch.ones(4, 8), (8,), torch.ones(8), 1e-6)
    assert counter.launches > 1


def test_only_the_named_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card(monkeypatch), OpCounter("cuda") as counter:
        numbers = torch.arange(4) + 1
        there = numbers.to("cuda")
        assert counter.ops == {"_to_copy": 1}
        torch.tensor([1, 2], device="cuda")
        there + 1
        with pytest.raises(DataDependentOutputException):
            there.tolist()
    assert counter.ops == {"_to_copy": 2, "add": 1}


def shape_at(pixels: int) -> Shape:
    config = chat_config(FULL, pixels)
    tower = VisionTower(config.mm_vision_tower, config)
    tower.directory = None
    return shape_of(config, tower)


def test_floors_of_two_gpus() -> None:
    """Milliseconds computed independently from widths and depths, and seconds per step."""
    small, large = shape_at(336), shape_at(448)

    def ms(cost: Cost) -> tuple[float, float]:
        return cost.seconds(H200) * 1e3, cost.seconds(A100) * 1e3

    def near(*expected: float) -> object:
        return pytest.approx(expected, rel=0.01)

    assert ms(tower_cost(small)) == near(8.4, 24.5) and ms(tower_cost(large)) == near(15.2, 44.5)
    assert ms(prefill_cost(small, 640)) == near(10.7, 31) and ms(prefill_cost(small, 1088)) == near(18.3, 53.3)
    assert ms(decode_cost(small, 1, 704)) == near(3.16, 7.55)
    assert ms(decode_cost(small, 16, 704)) == near(4.45, 10.6)
    assert ms(decode_cost(small, 16, 64, 640)) == near(3.28, 7.8)
    assert (load_cost(24.5e9, H200), load_cost(24.5e9, A100)) == near(0.445, 0.98)
    work = Work(prefix=576, own=18 * 27, answers=18, steps=18 / 16, new_tokens=2)
    assert tuple(18 / answers_seconds(small, work, card) for card in (H200, A100)) == near(604, 212)
    one = {"tokens": 32 * 612, "length": 612, "images": 32, "supervised": 32 * 20}
    two = {"tokens": 16 * 826, "length": 826, "images": 16, "supervised": 16 * 150}
    for batch, learns, plain, recomputed in (
        (one, Trainable(language=False), 0.92, 1.25),
        (two, Trainable(), 0.80, 1.02),
    ):
        assert train_cost(small, learns, **batch).seconds(H200) == pytest.approx(plain, rel=0.01)
        assert train_cost(small, learns, **batch, recompute=True).seconds(H200) == pytest.approx(recomputed, rel=0.01)


def test_a_random_model_answers_without_a_checkpoint() -> None:
    model = make_model("cpu", torch.float32, pixels=56, size=QUICK)
    tower = model.get_vision_tower()
    assert tower is not None and tower.is_loaded and not tower.training and not model.training
    assert len(tower.vision_tower.encoder.layers) == QUICK.tower_layers - 3  # select layer -4
    features = model.encode_images(torch.randn(2, 3, 56, 56))
    assert features.shape == (2, 16, QUICK.hidden) and features.isfinite().all()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    engine = make_engine(model, max_batch_size=2)
    assert not engine.special.end  # EOS is ignored
    image, prompt = torch.randn(3, 56, 56), [1, -200, 300, 301]
    answers = engine.generate([Request(prompt, [image], SamplingParams(6)), Request([1, 300], [], SamplingParams(3))])
    assert [len(answer.token_ids) for answer in answers] == [6, 3]
    assert all(answer.text for answer in answers)
