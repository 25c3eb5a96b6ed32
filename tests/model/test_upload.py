"""Pinned uploads, with copies deferred until an event is waited for, as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava.model.weights import ALIGNMENT, BUFFER_BYTES, CudaStaging, PinnedUploader

CPU = torch.device("cpu")


class LazyEvent:
    def __init__(self, device: LazyDevice, seen: int) -> None:
        self.device, self.seen = device, seen

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.run(self.seen)


class LazyDevice(CudaStaging, TorchDispatchMode):
    """Staging memory with deferred copies: they run only up to the event that is waited for.

    A buffer refilled too early therefore produces wrong values. `reads` are sizes of copies, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self.queue: list[tuple[Any, dict[str, Any]]] = []
        self.reads: list[int] = []
        self.done = self.waits = self.events = 0

    def allocate(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return self.buffers[-1]

    def record(self, device: torch.device) -> LazyEvent:
        self.events += 1
        return LazyEvent(self, len(self.queue))

    def run(self, until: int) -> None:
        while self.done < until:
            copy, options = self.queue[self.done]
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                torch.ops.aten.copy_.default(*copy, **options)
            self.done += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        staged = {buffer.untyped_storage().data_ptr() for buffer in self.buffers}
        if func is torch.ops.aten.copy_.default and args[1].untyped_storage().data_ptr() in staged:
            assert args[1].is_contiguous() and args[1].storage_offset() * args[1].itemsize % ALIGNMENT == 0
            self.reads.append(args[1].nbytes)
            self.queue.append((args, kwargs or {}))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def lazy() -> Iterator[LazyDevice]:
    with LazyDevice() as device:
        yield device


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check(found: Tensor, given: Tensor, dtype: torch.dtype) -> None:
    assert (found.dtype, found.shape) == (dtype, given.shape)
    assert found.is_contiguous()
    assert torch.equal(bits(found), bits(given.to(dtype)))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_arrives_whole(lazy: LazyDevice, stored: torch.dtype, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = [(), (1,), (0,), (3, 0, 2), (7, 5), (256,), (1000, 3), (1,), (2, 129), (64, 64), ()]
    given = [torch.randn(shape, generator=draw).to(stored) for shape in shapes]
    given += [torch.randn((9, 40), generator=draw).to(stored).t(), torch.randn(300, generator=draw).to(stored)[::3]]
    uploader = PinnedUploader(1024, lazy)
    found = [uploader.upload(tensor, CPU, dtype) for tensor in given]
    assert lazy.done < len(lazy.queue)  # the host ran ahead
    uploader.finish()
    assert lazy.done == len(lazy.queue)
    for one, tensor in zip(found, given, strict=True):
        check(one, tensor, dtype)
    narrower = min(stored.itemsize, dtype.itemsize)
    assert sum(lazy.reads) == narrower * sum(tensor.numel() for tensor in given)  # what crosses the bus
    assert len(lazy.buffers) == 2 and max(lazy.reads) <= 1024


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.complex64])
def test_other_dtypes(lazy: LazyDevice, dtype: torch.dtype) -> None:
    given = torch.arange(-300, 299).to(dtype)
    uploader = PinnedUploader(512, lazy)
    found = uploader.upload(given, CPU, dtype)
    uploader.finish()
    check(found, given, dtype)


def test_the_source_may_be_overwritten_at_once(lazy: LazyDevice) -> None:
    given = torch.arange(100.0)
    uploader = PinnedUploader(1024, lazy)
    found = uploader.upload(given, CPU, torch.float32)
    given.zero_()
    uploader.finish()
    assert torch.equal(found, torch.arange(100.0))


def test_a_large_tensor_takes_turns_in_two_buffers(lazy: LazyDevice) -> None:
    given = torch.arange(10 * 256 + 3, dtype=torch.float32)
    uploader = PinnedUploader(1024, lazy)
    found = uploader.upload(given, CPU, torch.float32)
    assert lazy.reads == [1024] * 10 + [12]
    assert lazy.waits == 9  # for all but the last two, whose transfers may still be running
    uploader.finish()
    check(found, given, torch.float32)


def test_small_tensors_share_a_buffer_without_waiting(lazy: LazyDevice) -> None:
    given = [torch.full((2,), float(number)) for number in range(8)]
    uploader = PinnedUploader(4 * ALIGNMENT, lazy)
    found = [uploader.upload(tensor, CPU, torch.float32) for tensor in given]
    assert (lazy.waits, lazy.events, lazy.done) == (0, 1, 0)  # eight tensors, two buffers, one event between them
    uploader.finish()
    assert torch.equal(torch.stack(found), torch.stack(given))
    again = uploader.upload(torch.ones(300), CPU, torch.float32)  # and it goes on
    uploader.finish()
    assert torch.equal(again, torch.ones(300)) and len(lazy.buffers) == 2


def test_a_buffer_is_free_when_all_its_devices_have_read_it(lazy: LazyDevice) -> None:
    """An event belongs to the stream of one device, so a buffer used for two devices has two."""
    other = torch.device("cpu", 0)
    uploader = PinnedUploader(1024, lazy)
    recorded: list[torch.device] = []
    record = lazy.record
    lazy.record = lambda device: recorded.append(device) or record(device)  # type: ignore[method-assign, func-returns-value]
    for device in (CPU, other, CPU):
        uploader.upload(torch.ones(8), device, torch.float32)
    uploader.upload(torch.ones(256), other, torch.float32)
    assert sorted(map(str, recorded)) == ["cpu", "cpu:0"]
    assert lazy.waits == 0
    uploader.finish()
    assert sorted(map(str, recorded)) == ["cpu", "cpu:0", "cpu:0"] and lazy.waits == 3


def test_what_is_on_a_device_already_is_not_staged() -> None:
    staging = LazyDevice()
    given = torch.zeros((3, 2), device="meta").t()
    found = PinnedUploader(1024, staging).upload(given, torch.device("meta"), torch.float16)
    assert (found.device.type, found.dtype, found.is_contiguous(), staging.buffers) == ("meta", torch.float16, True, [])


def test_an_idle_uploader_asks_nothing_of_cuda() -> None:
    PinnedUploader().finish()


def test_cuda_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is pinned, and an event is recorded on the stream of the target device."""
    calls: list[Any] = []

    class Event:
        def record(self, stream: Any) -> None:
            calls.append(stream)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: calls.append((size, options)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    CudaStaging().allocate(BUFFER_BYTES)
    assert isinstance(CudaStaging().record(torch.device("cuda:1")), Event)
    assert calls == [((BUFFER_BYTES,), {"dtype": torch.uint8, "pin_memory": True}), "stream of cuda:1"]
