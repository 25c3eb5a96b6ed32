"""The simulated GPU detects what a real one would; otherwise the tests on it prove nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.splice import check_slots
from tests import devices

flash = torch.ops.aten._scaled_dot_product_flash_attention
efficient = torch.ops.aten._scaled_dot_product_efficient_attention
HERE = "tests/cuda/test_devices.py"


def line_of(code: str) -> int:
    """Number of the only line of this file that equals `code`, ignoring indentation."""
    with open(__file__) as file:  # noqa: PTH123
        [number] = [number for number, line in enumerate(file, 1) if line.strip() == code]
    return number


def rand(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.rand(*shape, dtype=dtype, device=device)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_what_code_sees(card: devices.Card) -> None:
    x = torch.ones(2, 3, device="cuda")
    assert x.is_cuda and not x.is_meta and x.device == torch.device("cuda", 0) and x.get_device() == 0
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.get_device_capability() == (9, 0) and torch.cuda.is_bf16_supported(including_emulation=False)
    card.capability, card.free_bytes = (7, 5), {0: 2**30}
    assert not torch.cuda.is_bf16_supported(including_emulation=False)
    assert torch.cuda.mem_get_info() == (2**30, card.total_bytes)
    assert x.to("cuda") is x and x.cuda() is x and x.to("cuda", copy=True) is not x
    assert x.new_tensor([1.0]).is_cuda and torch.empty_like(x).is_cuda and F.one_hot(x.long(), 3).is_cuda
    assert torch.zeros(2, device="meta").is_meta and torch.zeros(2).device.type == "cpu"
    with pytest.raises(RuntimeError, match="invalid device ordinal 1"):
        torch.zeros(2, device="cuda:1")
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())


def test_the_real_machine_is_back_afterwards() -> None:
    before = torch.cuda.device_count(), torch.Tensor.to, torch.tensor
    with devices.simulated_cuda(count=3):
        assert torch.cuda.device_count() == 3
    assert (torch.cuda.device_count(), torch.Tensor.to, torch.tensor) == before
    with torch.inference_mode():
        assert torch.ones(1).is_inference()


def test_tensors_do_not_meet_across_devices() -> None:
    with devices.simulated_cuda(count=2) as card:
        near, far = rand(2, 2), rand(2, 2, device="cuda:1")
        for other in (far, torch.ones(2, 2)):
            for meet in (torch.add, torch.mm, lambda a, b: torch.cat([a, b]), lambda a, b: F.embedding(a.long(), b)):
                with pytest.raises(RuntimeError, match="same device"):
                    meet(near, other)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2) + near.sum()
        assert (near + torch.tensor(1.0)).is_cuda  # a CPU scalar may
        with card.record() as found:
            assert (near + far.to("cuda:0")).device == near.device
        assert [place.kind for place in found] == ["peer"]


def test_storage_and_views_are_shared(card: devices.Card) -> None:
    whole = torch.zeros(4, 3, device="cuda")
    layer = torch.nn.Linear(3, 2, device="cuda")
    layer.weight.data = whole[2:]
    whole.add_(1)
    assert layer.weight.tolist() == [[1.0] * 3] * 2
    assert layer.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert layer.weight.storage_offset() == 6 and layer.weight.is_cuda
    whole.as_strided((2,), (1,), 10).fill_(5)
    assert whole.tolist()[3] == [1.0, 5.0, 5.0]


def test_threads_see_the_card(card: devices.Card) -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2).pin_memory().to("cuda", non_blocking=True)))
    thread.start()
    thread.join()
    assert found[0].is_cuda


def test_gradients(card: devices.Card) -> None:
    table, ids = rand(5, 4).requires_grad_(), torch.arange(3, device="cuda")
    (F.embedding(ids, table)[1:, None] * 2).sum().backward()
    assert table.grad is not None and table.grad.is_cuda
    assert table.grad.tolist() == [[0.0] * 4, [2.0] * 4, [2.0] * 4, [0.0] * 4, [0.0] * 4]


# --- synchronisations ------------------------------------------------------------------------------------------------


def test_every_kind_of_event(card: devices.Card) -> None:
    x, mask = rand(4, 3), torch.arange(4, device="cuda") > 1
    pinned, host = torch.ones(4).pin_memory(), torch.ones(4)
    expected: list[tuple[Any, list[str]]] = [
        (lambda: x + 1, []),
        (lambda: torch.arange(4, device="cuda"), []),
        (lambda: torch.full((4,), 2.0, device="cuda"), []),
        (lambda: x[1:, None].masked_fill_(x[1:, None] > 2, 0.0), []),
        (lambda: torch.where(mask, 1.0, 2.0), []),
        (lambda: x.__setitem__(mask, 0.0), []),
        (lambda: pinned.to("cuda", non_blocking=True), ["upload"]),
        (lambda: pinned[:2].cuda(non_blocking=True), ["upload"]),
        (lambda: x[0].copy_(torch.ones(3).pin_memory(), non_blocking=True), ["upload"]),
        (lambda: torch.empty(2, pin_memory=True).fill_(1).to("cuda", non_blocking=True), ["upload"]),
        (lambda: pinned.to("cuda"), ["sync"]),
        (lambda: pinned.to("cuda", torch.bfloat16, non_blocking=True), ["sync"]),
        (lambda: host.to("cuda", non_blocking=True), ["sync"]),
        (lambda: torch.tensor([1, 2], device="cuda"), ["sync"]),
        (lambda: torch.as_tensor([1.0], device="cuda"), ["sync"]),
        (lambda: torch.tensor(3, device="cuda"), ["sync"]),
        (lambda: x[[0, 2]], ["sync"]),
        (lambda: x[torch.tensor([0, 2])], ["sync"]),
        (lambda: x[mask], ["sync"]),
        (lambda: x.__setitem__(mask, x[:2] * 0), ["sync"]),
        (lambda: x.masked_select(mask[:, None]), ["sync"]),
        (lambda: mask.nonzero(), ["sync"]),
        (lambda: torch.where(mask), ["sync"]),
        (lambda: torch.unique(x), ["sync"]),
        (lambda: x.repeat_interleave(mask.long(), dim=0), ["sync"]),
        (lambda: x.repeat_interleave(2, dim=0), []),
        (lambda: torch.multinomial(x + 1, 1), ["sync"]),
        (lambda: x.sum().item(), ["download"]),
        (lambda: x.tolist(), ["download"]),
        (lambda: bool(mask.any()), ["download"]),
        (lambda: int(x.sum()), ["download"]),
        (lambda: float(x.sum()), ["download"]),
        (lambda: f"{x.sum():.1f}", ["download"]),
        (lambda: torch.equal(x, x), ["download"]),
        (lambda: x.cpu(), ["download"]),
        (lambda: host.copy_(x[:, 0]), ["download"]),
        (lambda: torch.cuda.synchronize(), ["wait"]),
        (lambda: torch.cuda.Event().synchronize(), ["wait"]),
        (lambda: torch.cuda.current_stream().synchronize(), ["wait"]),
    ]
    for number, (act, kinds) in enumerate(expected):
        with card.record() as found:
            act()
        assert [place.kind for place in found] == kinds, f"number {number}: {found}"


def test_an_event_has_its_place(card: devices.Card) -> None:
    x = rand(4)
    with card.record() as found:
        x[x > 0.5]
        check_slots(torch.arange(3, device="cuda").unsqueeze(0), 1)
    assert [(place.kind, place.file) for place in found[:1]] == [("sync", HERE)]
    assert found[0].line == line_of("x[x > 0.5]") and "boolean mask" in found[0].what
    assert {place.file for place in found[1:]} == {"llava/model/splice.py"} and len(found.downloads) == 1
    table = found.table()
    assert f"1      sync      {HERE}:{found[0].line}" in table and table.startswith("count  kind")


def test_a_download_without_waiting_is_not_there_yet(card: devices.Card) -> None:
    x, host = torch.ones(3, device="cuda"), torch.zeros(3).pin_memory()
    event = torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    late = x.to("cpu", non_blocking=True)
    event.record()
    assert host.isnan().all() and late.isnan().all()
    event.synchronize()
    assert host.tolist() == late.tolist() == [1.0, 1.0, 1.0]


def test_pinned_memory_must_not_change_under_a_copy(card: devices.Card) -> None:
    pinned = torch.ones(3).pin_memory()
    there = pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    pinned[0] = 2  # the copy is done
    there = pinned.to("cuda", non_blocking=True)
    pinned[0] = 3
    with pytest.raises(RuntimeError, match="pinned memory changed before the host waited"):
        there.tolist()


# --- fused attention -------------------------------------------------------------------------------------------------


def plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, **options).cpu()


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_attention(card: devices.Card, causal: bool) -> None:
    query, key, value = (rand(2, 3, 7, 16) for _ in range(3))
    out, sums, *_ = efficient(query, key, value, None, True, is_causal=causal)
    torch.testing.assert_close(out.cpu(), plain(query, key, value, is_causal=causal))
    scores = (query @ key.mT / 4).cpu().masked_fill(torch.ones(7, 7).triu(1).bool() & causal, -torch.inf)
    torch.testing.assert_close(sums[..., :7].cpu(), scores.logsumexp(-1))
    half = [part.bfloat16() for part in (query, key, value)]
    for found, theirs in (flash(*half, is_causal=causal)[:2], efficient(*half, None, True, is_causal=causal)[:2]):
        torch.testing.assert_close(found.cpu(), plain(*half, is_causal=causal), atol=0.02, rtol=0.02)
        assert found.dtype == torch.bfloat16 and theirs.dtype == torch.float32
        assert found.transpose(1, 2).is_contiguous()  # as the kernels leave it


def test_a_bias_is_added(card: devices.Card) -> None:
    query, key, value = (rand(2, 3, 5, 16) for _ in range(3))
    bias = torch.zeros(2, 1, 1, 8, device="cuda")
    bias[0, ..., :2] = -torch.inf
    bias = bias[..., :5].expand(2, 3, 5, 5)
    out = efficient(query, key, value, bias, False)[0]
    torch.testing.assert_close(out.cpu(), plain(query, key, value, attn_mask=bias))
    assert efficient(query, key, value, bias, False)[1].shape == (2, 3, 0)


def test_padding_of_the_log_sum_exp_is_garbage(card: devices.Card) -> None:
    query = rand(1, 2, 5, 16)
    sums = efficient(query, query, query, None, True)[1]
    assert sums.shape == (1, 2, 32)
    assert sums[..., :5].isfinite().all() and sums[..., 5:].isnan().all()


def test_flash_refuses_what_the_kernel_does(card: devices.Card) -> None:
    for shape, dtype, message in (
        ((1, 2, 5, 16), torch.float32, "only supports fp16 and bf16"),
        ((1, 2, 5, 12), torch.bfloat16, "multiple of 8"),
        ((1, 2, 5, 264), torch.bfloat16, "up to 256"),
    ):
        query = rand(*shape, dtype=dtype)
        with pytest.raises(RuntimeError, match=message):
            flash(query, query, query)
    query = rand(1, 2, 5, 16, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="as many queries as keys"):
        flash(query[:, :, :2], query, query, is_causal=True)
    with pytest.raises(RuntimeError, match="last dimension"):
        flash(query.mT.contiguous().mT, query, query)
    with pytest.raises(RuntimeError, match="do not fit"):
        flash(query, query[:, :1], query[:, :1])


def test_older_cards_have_fewer_kernels(card: devices.Card) -> None:
    card.capability = (7, 5)
    for kernel, dtype in ((flash, torch.float16), (efficient, torch.bfloat16)):
        query = rand(1, 2, 5, 16, dtype=dtype)
        with pytest.raises(RuntimeError, match="needs an Ampere GPU"):
            kernel(query, query, query) if kernel is flash else kernel(query, query, query, None, True)
    query = rand(1, 2, 5, 16, dtype=torch.float16)
    assert efficient(query, query, query, None, True)[0].dtype == torch.float16


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_misaligned_bias_is_refused(card: devices.Card, dtype: torch.dtype, unit: int) -> None:
    query = rand(2, 3, 5, 16, dtype=dtype)

    def attend(bias: Tensor) -> None:
        efficient(query, query, query, bias, True)

    attend(rand(2, 3, 5, unit * 2, dtype=dtype)[..., :5])
    attend(rand(2, 1, 1, 8, dtype=dtype)[..., :5].expand(2, 3, 5, 5))
    for bias, message in (
        (rand(2, 3, 5, 5, dtype=dtype), "not correctly aligned"),
        (rand(2, 1, 1, 5, dtype=dtype).expand(2, 3, 5, 5), "strideB"),
        (rand(1, 3, 1, 5, dtype=dtype).expand(2, 3, 5, 5), "strideH"),
        (rand(2, 3, 5, unit * 2, dtype=dtype)[..., 1:6], "does not start"),
        (rand(2, 1, 1, unit * 2, dtype=dtype)[..., :5], "expanded to"),
        (rand(2, 3, 5, unit * 2)[..., :5].double(), "match query's dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            attend(bias)
