"""Kernel launches, floating-point operations and memory traffic of a piece of code, operator by operator.

    with OpCounter() as counter:
        model(x)
    print(counter.launches, counter.flops, counter.bytes, counter.table(10), sep="\n")

The counts come from the operators that reach the backend, so they are the same on a GPU and under `FakeTensorMode` with
tensors that only claim to be on one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that run no kernel although their schema does not say that the result shares the input's memory.
_FREE: Final = frozenset(
    {
        "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "detach_", "empty", "empty_like", "empty_permuted",
        "empty_strided", "is_same_size", "new_empty", "new_empty_strided", "resize_", "set_",
    }
)  # fmt: skip
# Composite operators that a GPU has a single kernel for, also where this build of torch has none.
_FUSED: Final = frozenset({"_fused_rms_norm"})
# Of the first argument, as many bytes are read as are written.
_LOOKUPS: Final = frozenset({"embedding", "gather", "index", "index_select"})
# The first argument is written without being read.
_WRITES: Final = frozenset({"copy_", "fill_", "normal_", "uniform_", "zero_"})
# The first argument is written at the places of the values only.
_SCATTERS: Final = frozenset({"_index_put_impl_", "index_put_"})


class OpCounter(TorchDispatchMode):
    """Counts what runs inside a `with` block; entering again adds to the counts.

    `launches` counts operators that run a kernel or a copy: views, allocations and metadata do not, and composite
    operators count as what they are made of, unless the device has a kernel for the whole. `flops` counts two a
    multiply-add of matrix products, convolutions and attention (causal attention at half its square). `bytes` counts
    each operator's distinct inputs once and its outputs once, each at the view's own size, as if nothing stayed in a
    cache. `ops` are the launches by operator. With `device_type`, operators without a tensor there are left out.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.launches = 0
        self.flops = 0
        self.bytes = 0
        self.ops: Counter[str] = Counter()

    def table(self, n: int = 10) -> str:
        """The `n` most frequent operators with their launches, a line each."""
        return "\n".join(f"{count:7d}  {name}" for name, count in self.ops.most_common(n))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        given = _tensors((args, kwargs))
        if _is_composite(func, name, given):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        made = _tensors(out)
        if not _is_free(func, name) and self._on_device([*given, *made]):
            self.launches += 1
            self.ops[name] += 1
            self.flops += _flops(func, name, args, kwargs, out)
            self.bytes += _traffic(func, name, given, made)
        return out

    def _on_device(self, tensors: Iterable[Tensor]) -> bool:
        return self.device_type is None or any(tensor.device.type == self.device_type for tensor in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_composite(func: Any, name: str, given: list[Tensor]) -> bool:
    """Whether the operator stands for others on the device of its tensors."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if func.namespace == "prim" or not has(func.name(), "CompositeImplicitAutograd"):
        return False
    kind = given[0].device.type if given else "cpu"
    return not (name in _FUSED and kind == "cuda") and not has(func.name(), kind.upper() if kind != "meta" else "Meta")


def _is_free(func: Any, name: str) -> bool:
    """Whether no kernel runs: the result is a view, fresh memory, or no tensor."""
    if name in _FREE or func.namespace == "prim" or not func._schema.returns:
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _traffic(func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes read and written; memory that an expanded view repeats counts once."""
    written = sum(map(_size, made))
    inputs = list({id(tensor): tensor for tensor in given}.values())
    if name in _LOOKUPS:
        return 2 * written + sum(map(_size, inputs[1:]))
    if name in _SCATTERS:
        return 2 * _size(inputs[-1]) + sum(map(_size, inputs[1:-1]))
    if name in _WRITES:
        inputs = inputs[1:]
    elif func._schema.arguments and func._schema.arguments[-1].is_out:
        inputs = inputs[: -len(made)]
    return written + sum(map(_size, inputs))


def _size(tensor: Tensor) -> int:
    own = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size]
    return math.prod(own) * tensor.element_size()


def _flops(func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    if "attention" in name:
        return _attention(func, name, args, kwargs)
    if name in ("convolution", "_convolution", "cudnn_convolution"):
        weight, transposed = args[1], name != "cudnn_convolution" and args[6]
        base = args[0] if transposed else out
        return int(2 * base.numel() * weight[0].numel())
    if name == "convolution_backward":
        wanted = sum(args[10][:2])  # of the input, of the weight
        return int(2 * wanted * args[0].numel() * args[2][0].numel())
    if name in _PRODUCTS:
        left = args[_PRODUCTS[name]]
        return int(2 * _first(out).numel() * left.shape[-1])
    return 0


# The position of the left factor, whose last dimension is summed over.
_PRODUCTS: Final = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "linear": 0, "_int_mm": 0, "_scaled_mm": 0,
    "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addmv": 1, "_addmm_activation": 1,
}  # fmt: skip


def _attention(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> int:
    """Two products forward, five backward (the scores are computed again)."""
    bound = dict(_bind(func, args, kwargs))
    query, key, value = (bound[name] for name in ("query", "key", "value"))
    layout = (-2, -3) if name.startswith(("_flash_attention", "_efficient_attention")) else (-3, -2)
    heads, queries = (query.shape[axis] for axis in layout)
    scores = query.shape[0] * heads * queries * key.shape[layout[1]]
    qk, pv = 2 * scores * query.shape[-1], 2 * scores * value.shape[-1]
    total = 3 * qk + 2 * pv if "backward" in name else qk + pv
    causal = bound.get("is_causal") or bound.get("causal") or bound.get("custom_mask_type")
    return total // 2 if causal else total


def _bind(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by the names of the schema."""
    for argument, value in zip(func._schema.arguments, args):
        yield argument.name, value
    yield from kwargs.items()


def _first(tree: Any) -> Any:
    return tree[0] if isinstance(tree, (tuple, list)) else tree
