"""Pretended devices, for what only a machine with several GPUs could show: tensors that must not meet across devices.

A tensor `on("xla:1", t)` keeps its numbers on the CPU and says it is elsewhere. Inside `Pretence()` an operation whose
tensors say they are on different devices fails, as it does on GPUs; `.to` carries between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

KIND = "xla"  # a device type this build of torch cannot run and does not try to start
CARRIERS = ("aten._to_copy.", "aten.copy_.", "aten.to.")
INDEXED = ("index.Tensor", "index_put_.default")  # these take indices from the CPU


def unwrap(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == KIND:
        return torch.device("cpu")
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


class Elsewhere(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {self.device}"

    def __getitem__(self, index: Any) -> Elsewhere:  # torch's own asks for the device itself
        return Elsewhere(self.inner[tree_map(unwrap, index)], self.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.inner[tree_map(unwrap, index)] = unwrap(value)

    def __int__(self) -> int:
        return int(self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __float__(self) -> float:
        return float(self.inner)

    def nonzero(self) -> Elsewhere:  # type: ignore[override]
        return Elsewhere(self.inner.nonzero(), self.device)

    def __invert__(self) -> Elsewhere:
        return Elsewhere(~self.inner, self.device)

    def contiguous(self) -> Elsewhere:  # type: ignore[override]
        return Elsewhere(self.inner.contiguous(), self.device)

    def item(self) -> Any:
        return self.inner.item()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Pretence(TorchDispatchMode):
    """Needed where plain tensors are sent to, or made on, a pretended device."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` then comes by here too
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the CPU, after checking that its tensors are said to be on one device; so is the result."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    checked = tensors[:1] if any(name in str(func) for name in INDEXED) else tensors
    places = {tensor.device for tensor in checked if tensor.dim() or isinstance(tensor, Elsewhere)}
    if len(places) > 1 and not str(func).startswith(CARRIERS):
        raise RuntimeError(f"{func} got tensors on {', '.join(sorted(map(str, places)))}")
    asked = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.device)]
    target = asked[0] if asked else tensors[0].device if tensors else None
    wrappers = {id(t.inner): t for t in tensors if isinstance(t, Elsewhere)}
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or target is None or target.type != KIND:
            return leaf
        known = wrappers.get(id(leaf))
        return known if known is not None and known.device == target else Elsewhere(leaf, target)

    return tree_map(wrap, result)
