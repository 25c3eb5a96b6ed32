"""Count kernel launches, floating-point operations and memory traffic of code, per operator.

    with OpCounter() as counter:
        model(x)
    print(counter.launches, counter.flops, counter.bytes)
    print(counter.table(10))

The counts come from the operators that reach the backend, so they are the same on a GPU and under `FakeTensorMode`
with fake CUDA tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.floor import Ceilings, Cost

# Operators without a kernel that the schema does not mark as views.
_FREE: Final = frozenset(
    {
        "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "detach_", "empty", "empty_like", "empty_permuted",
        "empty_strided", "is_pinned", "is_same_size", "new_empty", "new_empty_strided", "record_stream", "resize_",
        "set_",
    }
)  # fmt: skip
# Composite operators that are one kernel on a GPU, even where this build of torch has none.
_FUSED: Final = frozenset({"aten::_fused_rms_norm"})
# Operators whose CUDA kernel needs contiguous rows and copies a strided input first.
_PACKS_INPUT: Final = frozenset({"_fused_rms_norm"})
# Operators that read only as many bytes of the first argument as they write.
_LOOKUPS: Final = frozenset({"embedding", "gather", "index", "index_select"})
# Operators that write the first argument without reading it.
_WRITES: Final = frozenset({"copy_", "fill_", "normal_", "uniform_", "zero_"})
# Operators that write only the indexed elements of the first argument.
_SCATTERS: Final = frozenset({"_index_put_impl_", "index_put_"})
# Matmuls, with the position of the left factor (its last dimension is summed over).
_PRODUCTS: Final = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "linear": 0, "_int_mm": 0, "_scaled_mm": 0,
    "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addmv": 1, "_addmm_activation": 1,
}  # fmt: skip


class OpCounter(TorchDispatchMode):
    """Count what runs inside a `with` block; entering it again adds to the counts.

    `launches` counts operators that run a kernel or a copy: views, allocations and metadata do not, and composite
    operators count as their parts, unless the device has a kernel for the whole. `flops` counts two per multiply-add
    of matmuls, convolutions and attention (causal attention at half the full square). `bytes` counts each operator's
    distinct inputs once and its outputs once, each at the size of the view, as if nothing were cached. `ops` holds the
    launches per operator. With `device_type`, operators without a tensor on such a device are ignored.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.launches = 0
        self.flops = 0
        self.bytes = 0
        self.ops: Counter[str] = Counter()
        self._costs: list[Cost] = []

    def seconds(self, ceilings: Ceilings) -> float:
        """Time on a device if each operator ran at its roofline (Williams et al., "Roofline", 2009) and launches were
        hidden."""
        return sum(cost.seconds(ceilings) for cost in self._costs)

    def table(self, n: int = 10) -> str:
        """The `n` most frequent operators and their launches, one per line."""
        return "\n".join(f"{count:7d}  {name}" for name, count in self.ops.most_common(n))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        given = _tensors((args, kwargs))
        if _is_composite(func, given[0].device.type if given else "cpu"):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        made = _tensors(out) or _mutated(func, args)
        tensors = [*given, *made]
        if tensors and not _is_free(func, name, tensors) and self._on_device(tensors):
            self._count(name, _flops(func, name, args, kwargs, out), _traffic(func, name, given, made))
            if name in _PACKS_INPUT and not given[0].is_contiguous():
                self._count("clone", 0, 2 * _size(given[0]))
        return out

    def _count(self, name: str, flops: int, traffic: int) -> None:
        self.launches += 1
        self.ops[name] += 1
        self.flops += flops
        self.bytes += traffic
        self._costs.append(Cost(flops, traffic))

    def _on_device(self, tensors: Iterable[Tensor]) -> bool:
        return self.device_type is None or any(tensor.device.type == self.device_type for tensor in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@cache
def _is_composite(func: Any, kind: str) -> bool:
    """Whether the operator is decomposed on devices of this type."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if func.namespace == "prim" or not has(func.name(), "CompositeImplicitAutograd"):
        return False
    if kind == "cuda" and func._schema.name in _FUSED:
        return False
    return not has(func.name(), "Meta" if kind == "meta" else kind.upper())


def _is_free(func: Any, name: str, tensors: list[Tensor]) -> bool:
    """Whether no kernel runs: the result is a view, fresh memory, or no tensor."""
    if name == "lift_fresh":  # the only trace of `torch.tensor(values)`: on a GPU, an upload
        return tensors[0].device.type == "cpu"
    if name in _FREE or func.namespace == "prim":
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _mutated(func: Any, args: Any) -> list[Tensor]:
    """The arguments that an operator without a result writes to."""
    pairs = zip((argument.alias_info for argument in func._schema.arguments), args)
    return _tensors([value for alias, value in pairs if alias is not None and alias.is_write])


def _traffic(func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes read and written; memory repeated by an expanded view counts once."""
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
    """FLOPs: matmuls by shape, convolutions and attention by torch's formulas, causal attention at half."""
    if name in _PRODUCTS:
        result = out[0] if isinstance(out, (tuple, list)) else out
        return int(2 * result.numel() * args[_PRODUCTS[name]].shape[-1])
    formula = flop_counter.flop_registry.get(func._overloadpacket)
    if formula is not None:
        count = int(formula(*args, **kwargs, out_val=out))
    elif name == "_scaled_dot_product_flash_attention_for_cpu":
        count = int(flop_counter.sdpa_flop_count(*(part.shape for part in args[:3])))
    else:
        return 0
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    causal = named.get("is_causal") or named.get("causal") or named.get("custom_mask_type")
    return count // 2 if causal else count
