"""A simulated CUDA machine: code takes its CUDA branches, with values computed on the CPU.

    with devices.simulated_cuda(count=2) as card:
        model = load_pretrained_model(path, device="cuda")[1]
        with card.record() as events:
            ...
    print(events.table())

A `DeviceTensor` keeps its values in a CPU tensor and reports the device "cuda:0". Operations on tensors of different
devices fail, as on GPUs. Copies between host and device, and other synchronisations, are recorded with the line that
caused them (`tests.cuda.events`). The target of an asynchronous copy holds garbage until the host waits, and pinned
memory must not change before that. Fused CUDA attention is computed by `tests.cuda.kernels`.

To torch's C++ code a `DeviceTensor` is on "meta:0": autograd runs such tensors without a device thread, and factories
that derive their device from a tensor come back here, which tells a simulated GPU from the real meta device by its
index. So autocast, which looks at the C++ device, does not affect these tensors.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda import events as events_
from tests.cuda.events import Events, Kind
from tests.cuda.kernels import KERNELS, check_capability

GIB = 2**30
COPIES = ("aten::_to_copy", "aten::copy_")
HOST_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
RESIZING = ("aten::resize_", "aten::set_")


class DeviceTensor(Tensor):
    """A tensor that reports a simulated GPU as its device; `inner` holds its values on the CPU."""

    inner: Tensor
    where: torch.device

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta", device.index),
        )
        made.inner, made.where = inner, device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner, self.where = value.inner, value.where

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {self.where}"

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, bool | int | float):  # on CUDA torch keeps such a value on the host
            value = torch.full((), value, dtype=self.dtype)
        super().__setitem__(index, value)

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def get_device(self) -> int:
        return int(self.where.index)

    def tolist(self) -> Any:
        note("download", "tolist")
        return self.inner.tolist()

    def new(self, *args: Any) -> Tensor:
        if args and not isinstance(args[0], int):
            return torch.tensor(args[0], dtype=self.dtype, device=self.where)
        return torch.empty(args, dtype=self.dtype, device=self.where)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.where} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Pretence(TorchDispatchMode):
    """Route creation on, and copies to, a simulated GPU through `compute`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


@dataclass(eq=False)
class Card:
    """The simulated machine: `count` equal GPUs, their memory, and recorded events."""

    count: int = 1
    name: str = "Simulated H200"
    capability: tuple[int, int] = (9, 0)
    total_bytes: int = 139 * GIB
    free_bytes: dict[int, int] = field(default_factory=dict)  # by GPU; default: all of it
    current: int = 0
    recorders: list[Events] = field(default_factory=list)
    pinned: dict[int, Any] = field(default_factory=dict)  # storages of pinned memory by address, kept alive
    arriving: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # host memory and its future values
    leaving: list[tuple[Tensor, Tensor, str]] = field(default_factory=list)  # host memory and the values read from it

    @contextlib.contextmanager
    def record(self) -> Iterator[Events]:
        """Collect the events of a `with` block."""
        found = Events()
        self.recorders.append(found)
        try:
            yield found
        finally:
            self.recorders[:] = [one for one in self.recorders if one is not found]

    def note(self, kind: Kind, what: str, *, waits: bool = True) -> None:
        """Record an event; if the host waits for it, complete the copies in flight."""
        if self.recorders:
            place = events_.place(kind, what)
            for recorder in self.recorders:
                recorder.append(place)
        if waits:
            self.complete()

    def complete(self) -> None:
        """Complete the copies in flight: downloads arrive, and pinned memory may change."""
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            for host, value in self.arriving:
                host.copy_(value)
            self.arriving.clear()
            leaving, self.leaving = self.leaving, []
            for host, value, place in leaving:
                if not torch.equal(as_bytes(host), as_bytes(value)):
                    raise RuntimeError(f"pinned memory changed before the host waited for its {place}")

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def resolve(self, device: Any) -> torch.device | None:
        """The GPU that `device` (as accepted by torch functions) names, with its index; None for other devices."""
        if isinstance(device, int) and not isinstance(device, bool):
            device = torch.device("cuda", device)
        if not isinstance(device, str | torch.device):
            return None
        device = torch.device(device)
        if device.type == "meta" and device.index is not None:  # a simulated GPU as seen by C++ code
            return torch.device("cuda", device.index)
        if device.type != "cuda":
            return None
        index = self.current if device.index is None else device.index
        if not 0 <= index < self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {self.count}")
        return torch.device("cuda", index)


_cards: list[Card] = []


def note(kind: Kind, what: str) -> None:
    for card in _cards[-1:]:
        card.note(kind, what)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def leaves(part: Any) -> Iterator[Any]:
    """Flatten an operator's arguments (torch's own pytrees would take half the time of a test)."""
    if isinstance(part, list | tuple):
        for one in part:
            yield from leaves(one)
    else:
        yield part


def change(part: Any, how: Callable[[Any], Any]) -> Any:
    """`part` with `how` applied to its leaves."""
    if isinstance(part, list | tuple):
        return type(part)([change(one, how) for one in part])
    return how(part)


def inner(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and _cards[-1].resolve(leaf) is not None:
        return torch.device("cpu")
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the CPU after checking that its tensors report one device; the result reports it too."""
    card = _cards[-1]
    given = list(leaves((args, tuple(kwargs.values()))))
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    asked = [leaf for leaf in given if isinstance(leaf, torch.device)]
    target = card.resolve(asked[0]) if asked else ours[0].where if ours else None
    pin = bool(kwargs.pop("pin_memory", False)) if "pin_memory" in kwargs else False
    if not ours and target is None:
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            result = func(*args, **kwargs)
        return card.pin(result) if pin else result
    name = func._schema.name
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if name not in COPIES:
        check_devices(func, tensors)
        hidden = events_.hidden_sync(func, args, kwargs)
        if hidden is not None:
            card.note(*hidden)
    if func in KERNELS:
        check_capability(func, card.capability, ours[0].dtype)
    run = KERNELS.get(func, func)
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        result = run(*change(args, inner), **{key: change(value, inner) for key, value in kwargs.items()})
    if name in COPIES:
        copied(card, name, args, kwargs, result, target)
    return wrap(result, target, ours, name)


def wrap(result: Any, target: torch.device | None, ours: list[DeviceTensor], name: str) -> Any:
    """Wrap the tensors in `result` as being on `target`; those that were arguments stay the same objects."""
    known = {id(tensor.inner): tensor for tensor in ours}

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or target is None:
            return leaf
        same = known.get(id(leaf))
        if same is None:
            return DeviceTensor(leaf, target)
        if same.shape != leaf.shape or same.stride() != leaf.stride():
            raise NotImplementedError(f"{name} changes the shape of a simulated tensor in place")
        return same

    return change(result, one)


def check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Require one device, except for CPU scalars and for indices, which may be on the CPU."""
    if func._schema.name in HOST_INDICES:
        tensors = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    places = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, DeviceTensor)}
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got tensors on "
            f"{', '.join(sorted(map(str, places)))}"
        )


def copied(
    card: Card, name: str, args: Any, kwargs: dict[str, Any], result: Tensor, target: torch.device | None
) -> None:
    """Record a copy, and defer its arrival if the host does not wait for it."""
    to, source = (result, args[0]) if name == "aten::_to_copy" else (args[0], args[1])
    there, here = target, source.where if isinstance(source, DeviceTensor) else None
    if name == "aten::copy_":
        there = to.where if isinstance(to, DeviceTensor) else None
    same_dtype, empty = to.dtype == source.dtype, source.numel() == 0
    non_blocking = bool(kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False))
    if there == here or empty:
        return
    if there is not None and here is not None:
        card.note("peer", f"{here} to {there}", waits=False)
    elif there is not None:
        direct = same_dtype and source.is_contiguous()  # otherwise torch converts on the host first, into new memory
        if card.is_pinned(source) and non_blocking and direct:
            card.note("upload", name, waits=False)
            card.leaving.append((source, source.clone(), "upload"))
        elif card.is_pinned(source) and direct:
            card.note("sync", "pinned upload without non_blocking")
        else:
            card.note("sync", "pageable upload" if not card.is_pinned(source) else "upload that converts on the host")
    else:
        direct = same_dtype and to.is_contiguous() and (name == "aten::_to_copy" or card.is_pinned(to))
        card.note("download", name, waits=not (non_blocking and direct))
        if non_blocking and direct:
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                card.arriving.append((to, to.clone()))
                to.fill_(math.nan if to.is_floating_point() else -(2**6) if to.dtype != torch.bool else True)


class Stream:
    """A stream on which work completes immediately."""

    def __init__(self, device: Any = None, priority: int = 0, **more: Any) -> None:
        self.device = _cards[-1].resolve("cuda" if device is None else device)
        self.cuda_stream = 0

    def synchronize(self) -> None:
        note("wait", "stream.synchronize")

    def query(self) -> bool:
        _cards[-1].complete()
        return True

    def is_capturing(self) -> bool:
        return False

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Event:
    """A completed event; waiting for it is still recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        _cards[-1].complete()
        return True

    def synchronize(self) -> None:
        note("wait", "event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def enter_no_grad(self: Any) -> None:
    """Replacement for `torch.inference_mode`, which does not support tensors with `__torch_dispatch__`."""
    self.simulated = torch.no_grad() if self.mode else contextlib.nullcontext()
    self.simulated.__enter__()


def exit_no_grad(self: Any, *error: Any) -> None:
    self.simulated.__exit__(*error)


@contextlib.contextmanager
def simulated_cuda(count: int = 1) -> Iterator[Card]:
    """A machine with `count` simulated GPUs, in this thread and in those that it starts."""
    card = Card(count)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda_functions(card).items():
            patch.setattr(torch.cuda, name, value)
        for name, value in accelerator_functions(card).items():
            if hasattr(torch, "accelerator"):  # torch 2.6
                patch.setattr(torch.accelerator, name, value, raising=False)
        for owner, name, value in tensor_functions(card):
            patch.setattr(owner, name, value)
        patch.setattr(torch.inference_mode, "__enter__", enter_no_grad)
        patch.setattr(torch.inference_mode, "__exit__", exit_no_grad)
        run = threading.Thread.run

        def run_simulated(self: threading.Thread) -> None:
            with Pretence():
                run(self)

        patch.setattr(threading.Thread, "run", run_simulated)
        _cards.append(card)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` then shows its copy
        try:
            with Pretence():
                yield card
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            _cards.remove(card)


def cuda_functions(card: Card) -> dict[str, Any]:
    """Replacements for the `torch.cuda` functions that query a driver."""

    def number(device: Any = None) -> int:
        found = card.resolve("cuda" if device is None else device)
        assert found is not None
        return int(found.index)

    def set_device(device: Any) -> None:
        card.current = number(device)

    def exchange(index: int) -> int:
        before = card.current
        card.current = before if index < 0 else index
        return before

    def properties(device: Any = None) -> SimpleNamespace:
        major, minor = card.capability
        return SimpleNamespace(
            name=card.name, major=major, minor=minor, total_memory=card.total_bytes, multi_processor_count=132
        )

    def memory(device: Any = None) -> tuple[int, int]:
        return card.free_bytes.get(number(device), card.total_bytes), card.total_bytes

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: card.count,
        "current_device": lambda: card.current,
        "set_device": set_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: card.name,
        "get_device_properties": properties,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or card.capability >= (8, 0),
        "mem_get_info": memory,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: card.note("wait", "torch.cuda.synchronize"),
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream or Stream(),
        "set_stream": lambda stream: None,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),  # random values come from the CPU's generator
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * card.count,
        "set_rng_state_all": lambda states: None,
    }


def accelerator_functions(card: Card) -> dict[str, Any]:
    """The same for `torch.accelerator`."""
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: card.count,
        "current_device_index": lambda: card.current,
        "current_stream": lambda device=None: Stream(device),
        "synchronize": lambda device=None: card.note("wait", "torch.accelerator.synchronize"),
    }


def tensor_functions(card: Card) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Replacements for the functions that query CUDA before they dispatch: they get the C++ device."""

    def backend(device: Any) -> Any:
        found = card.resolve(device)
        return device if found is None else torch.device("meta", found.index)

    def making(name: str) -> tuple[Any, str, Callable[..., Any]]:
        plain = getattr(torch, name)

        def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
            made = plain(*args, device=None if device is None else backend(device), **kwargs)
            return card.pin(made.clone()) if pin_memory else made

        return torch, name, make

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and not isinstance(args[0], Tensor | torch.dtype):
            args = (backend(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = backend(kwargs["device"])
        moved: Tensor = torch._C.TensorBase.to(self, *args, **kwargs)
        return moved

    def cuda(self: Tensor, device: Any = None, non_blocking: bool = False, **more: Any) -> Tensor:
        return to(self, "cuda" if device is None else device, non_blocking=non_blocking, **more)

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        if isinstance(self, DeviceTensor):
            raise RuntimeError(f"cannot pin '{self.type()}': only dense CPU tensors can be pinned")
        return self if card.is_pinned(self) else card.pin(self.clone())

    def new_tensor(self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device if device is None else device, **more)

    return [
        *map(making, ("tensor", "as_tensor", "asarray")),
        (Tensor, "to", to),
        (Tensor, "cuda", cuda),
        (Tensor, "pin_memory", pin_memory),
        (Tensor, "is_pinned", lambda self, device=None: card.is_pinned(self)),
        (Tensor, "new_tensor", new_tensor),
    ]
