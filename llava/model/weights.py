"""Build models without allocating weights, and load tensors onto their devices through pinned staging buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import no_init_weights

from llava.errors import CheckpointError

BUFFER_BYTES: Final = 64 * 2**20
ALIGNMENT: Final = 256  # bytes; a multiple of every element size
WeightLoader = Callable[[nn.Module, str, Tensor, torch.device], bool]


@contextmanager
def empty_weights() -> Iterator[None]:
    """Create the parameters of new modules on the meta device, without initialization; buffers are allocated."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def load_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
    source: str,
    optional: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
    weight_loader: WeightLoader | None = None,
) -> None:
    """Assign each of `tensors` to its parameter of a model built under `empty_weights`, converted to `dtype`.

    `device` may be a function of the parameter name. `weight_loader(model, name, tensor, device)` may assign a tensor
    itself, e.g. quantized, and then returns True.

    Raises `CheckpointError` for a tensor without a parameter (unless its name contains one of `ignored`), a different
    shape, or a parameter without a tensor (unless its name starts with one of `optional`: those become zeros).
    """
    where = device if callable(device) else lambda name: torch.device(device)
    wanted = dict(model.named_parameters())
    found: set[str] = set()
    unexpected, wrong = [], []
    uploader = PinnedUploader()
    for name, tensor in tensors:
        target = wanted.get(name)
        found.add(name)
        if target is None:
            if not any(part in name for part in ignored):
                unexpected.append(name)
        elif target.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(target.shape)}")
        elif weight_loader is None or not weight_loader(model, name, tensor, where(name)):
            _set_tensor(model, name, where(name), tensor, dtype, uploader)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    missing = []
    for name, parameter in model.named_parameters():
        if name not in found and name.startswith(optional):
            zeros = torch.zeros(parameter.shape, device=where(name))
            _set_tensor(model, name, where(name), zeros, dtype, uploader)
        elif name not in found:
            missing.append(name)
    _check_fit(source, {"missing": missing, "unexpected": unexpected, "of a different shape": wrong})
    for buffer_name, buffer in model.named_buffers():
        if buffer.device != where(buffer_name):
            _set_tensor(model, buffer_name, where(buffer_name), buffer, buffer.dtype, uploader)
    uploader.finish()


def _check_fit(source: str, misfits: dict[str, list[str]]) -> None:
    """Raise `CheckpointError` with the count and the first three names of each kind of `misfits`, if there are any."""
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for label, names in misfits.items()
        if names
    ]
    if problems:
        raise CheckpointError(f"The weights in {source} do not match the configuration: {'; '.join(problems)}.")


def _set_tensor(
    model: nn.Module, name: str, device: torch.device, value: Tensor, dtype: torch.dtype, uploader: PinnedUploader
) -> None:
    """Replace the parameter or buffer `name` by `value` on `device`, in `dtype` if it is floating point.

    Copies to CUDA are asynchronous, through `uploader`. On the CPU, a `value` of `dtype` is not copied, so a
    memory-mapped file is read only when the model runs.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if not (value.is_floating_point() or value.is_complex()):
        dtype = value.dtype
    placed = uploader.upload(value, device, dtype) if device.type == "cuda" else value.to(device, dtype)
    if attribute in module._buffers:
        module._buffers[attribute] = placed
        return
    old = module.get_parameter(attribute)
    module._parameters[attribute] = type(old)(placed, requires_grad=old.requires_grad)


class Event(Protocol):
    """A CUDA event, or a stand-in."""

    def synchronize(self) -> None:
        """Wait until all work queued before the event is done."""


class CudaStaging:
    """Pinned host memory and CUDA events for `PinnedUploader`."""

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
    """A staging buffer, to be refilled once all `events` are complete."""

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
    """Upload tensors of any size through two pinned buffers: one is filled while copies from the other are in flight.

    Reading tensors from memory or mapped files overlaps earlier transfers. Small tensors share a buffer, large ones are
    split. Buffers are allocated at first use. An uploader may be dropped without `finish`: PyTorch does not reuse
    pinned memory until copies from it are complete.
    """

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, staging: CudaStaging | None = None) -> None:
        self.buffer_bytes = -(-buffer_bytes // ALIGNMENT) * ALIGNMENT
        self.staging = staging or CudaStaging()
        self.filling: _Buffer | None = None
        self.in_flight: _Buffer | None = None

    @torch.no_grad()
    def upload(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A contiguous copy of `tensor` on `device` in `dtype`; a CPU `tensor` may be overwritten at once.

        Later work on the current stream sees the complete copy; `finish` waits for it. The narrower of the two dtypes
        is transferred.
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
