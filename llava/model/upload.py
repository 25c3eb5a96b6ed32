"""Asynchronous host-to-device copies through two pinned staging buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

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
