"""Batched host/device transfers of small tensors and numbers: at most one synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llava.placement import to_device

Numbers = Sequence[int] | Sequence[float] | Tensor

_ALIGNMENT = 8  # bytes; the largest element that is sent


def to_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copy integer or boolean tensors `(B, n_i)` to the CPU in a single transfer, as int64.

    The copy waits for the device once, however many tensors are given. Tensors that are on the CPU already, and
    `None`, are returned as they are.
    """
    remote = [tensor for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    if not remote:
        return list(tensors)
    joined = torch.cat([tensor.to(remote[0].device, torch.long) for tensor in remote], dim=1).cpu()
    parts = iter(torch.split(joined, [tensor.shape[1] for tensor in remote], dim=1))
    return [tensor if tensor is None or tensor.device.type == "cpu" else next(parts) for tensor in tensors]


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors of any shapes and dtypes to `device`; to CUDA in one asynchronous copy from a pinned buffer."""
    if device.type != "cuda" or not tensors:
        return [tensor.to(device) for tensor in tensors]
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    sizes = [-(-len(part) // _ALIGNMENT) * _ALIGNMENT for part in parts]
    packed = torch.empty(sum(sizes), dtype=torch.uint8)
    for part, room in zip(parts, torch.split(packed, sizes), strict=True):
        room[: len(part)] = part
    sent = torch.split(to_device(packed, device), sizes)
    return [
        room[: len(part)].view(tensor.dtype).view(tensor.shape)
        for tensor, part, room in zip(tensors, parts, sent, strict=True)
    ]


def upload_columns(columns: Sequence[Numbers], device: torch.device) -> list[Tensor]:
    """Copy `columns` of numbers, each of a length of its own, to `device` as `upload` does.

    Floats become float32; integers int64, and int32 on CUDA, which takes such indices too.
    """
    integers = torch.int32 if device.type == "cuda" else torch.int64
    tensors = [torch.as_tensor(one, dtype=torch.float32 if _is_float(one) else integers) for one in columns]
    return upload(tensors, device)


def _is_float(column: Numbers) -> bool:
    return column.is_floating_point() if isinstance(column, Tensor) else isinstance(column[0], float)


# --- Asynchronous host-to-device copies through two pinned staging buffers --------------------------------------------


BUFFER_BYTES = 64 * 2**20
ALIGNMENT = 256  # bytes; a multiple of every element size


class Event(Protocol):
    """A marker in a device's stream of work."""

    def synchronize(self) -> None:
        """Wait until all work queued before the event is done."""


class CudaStaging:
    """Pinned host memory and CUDA events, the CUDA features that `PinnedUploader` needs besides tensor copies."""

    def allocate(self, nbytes: int) -> Tensor:
        """Page-locked host memory, uint8 `(nbytes,)`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def record(self, device: torch.device) -> Event:
        """An event recorded after the work queued so far on the current stream of `device`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event


@dataclass
class _Buffer:
    """A staging buffer; it may be refilled once all `events` are complete."""

    data: Tensor  # uint8
    used: int = 0  # bytes
    devices: set[torch.device] = field(default_factory=set)  # copied to since `events` were recorded
    events: list[Event] = field(default_factory=list)

    def room(self, itemsize: int) -> int:
        """How many elements of `itemsize` bytes still fit."""
        return (len(self.data) - self.used) // itemsize

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next `count` elements, as `dtype`."""
        start, size = self.used, count * dtype.itemsize
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return self.data[start : start + size].view(dtype)


class PinnedUploader:
    """Upload tensors of any size; reading a tensor from memory or a mapped file overlaps earlier transfers.

    Double buffering with `buffer_bytes` per buffer: while copies from one are in flight, the other is filled. Small
    tensors share a buffer and large ones are split, so the host waits only when it is a whole buffer ahead of the
    device. Buffers are allocated at first use. An uploader may be dropped without `finish`: PyTorch does not reuse
    pinned memory until copies from it are complete.
    """

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, staging: CudaStaging | None = None) -> None:
        self.buffer_bytes = -(-buffer_bytes // ALIGNMENT) * ALIGNMENT
        self.staging = staging or CudaStaging()
        self.filling: _Buffer | None = None
        self.in_flight: _Buffer | None = None

    @torch.no_grad()
    def upload(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A contiguous copy of `tensor` on `device` in `dtype`; the caller may overwrite a CPU `tensor` immediately.

        Work queued later on the current stream of `device` sees the complete copy; `finish` waits for it. The narrower
        dtype is transferred: the device widens, the host narrows.
        """
        if tensor.device.type != "cpu":
            return tensor.to(device, dtype).contiguous()
        result = torch.empty(tensor.shape, dtype=dtype, device=device)
        staged = tensor.dtype if tensor.dtype.itemsize <= dtype.itemsize else dtype
        source, destination = tensor.reshape(-1), result.view(-1)
        start, total = 0, tensor.numel()
        while start < total:
            buffer = self._buffer(staged.itemsize)
            stop = min(total, start + buffer.room(staged.itemsize))
            host = buffer.take(stop - start, staged).copy_(source[start:stop])
            if staged != dtype:  # `copy_` alone would convert on the host, into pageable memory
                host = host.to(device, non_blocking=True)
            destination[start:stop].copy_(host, non_blocking=True)
            buffer.devices.add(device)
            start = stop
        return result

    def finish(self) -> None:
        """Wait until all uploads are complete."""
        for buffer in (self.in_flight, self.filling):
            if buffer is not None:
                self._record(buffer)
                self._reclaim(buffer)

    def _buffer(self, itemsize: int) -> _Buffer:
        """The buffer being filled, with room for at least one element of `itemsize` bytes."""
        if self.filling is None:
            self.filling = self._allocate()
        elif not self.filling.room(itemsize):
            self._record(self.filling)
            self.filling, self.in_flight = self.in_flight or self._allocate(), self.filling
            self._reclaim(self.filling)
        return self.filling

    def _allocate(self) -> _Buffer:
        return _Buffer(self.staging.allocate(self.buffer_bytes))

    def _record(self, buffer: _Buffer) -> None:
        """Record events after the copies from `buffer`, one per target device."""
        buffer.events += [self.staging.record(device) for device in buffer.devices]
        buffer.devices.clear()

    def _reclaim(self, buffer: _Buffer) -> None:
        """Wait until `buffer` has been read, then reset it."""
        for event in buffer.events:
            event.synchronize()
        buffer.events, buffer.used = [], 0
