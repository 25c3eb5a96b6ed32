"""LoRA adapters beside their base (arXiv:2106.09685): every row of a batch may use another adapter, or none.

The low-rank matrices stay apart from the weights of the base, which are read once for all rows. Adapters are counted
from 1; 0 is the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.lora_adapter import LoraAdapter
from llava.model.transfer import upload_columns

RANKS: Final = 16  # ranks are padded with zeros to a multiple of it, for the C++ kernel
Rows = slice | Tensor
Pair = tuple[Tensor, Tensor]  # A (R, in) and B (out, R), with the scale in B


class LoraStep:
    """Adapters of the rows of a forward pass; with `seqlens`, of the tokens of a packed prefill.

    `last` are those of the rows' last tokens.
    """

    def __init__(self, adapters: Sequence[int], seqlens: Sequence[int] | None = None) -> None:
        self.adapters = tuple(adapters)
        self.is_packed = seqlens is not None
        self.last = LoraStep(adapters) if self.is_packed else self
        self.present = sorted({*adapters} - {0})
        self.first, self.stop = self.present[0], self.present[-1] + 1  # a range with all of them
        owners = torch.tensor(self.adapters)
        self._owners = owners if seqlens is None else owners.repeat_interleave(torch.tensor(seqlens))
        self._groups: dict[torch.device, list[tuple[int, Rows]]] = {}
        self._masks: dict[torch.device, Tensor | None] = {}

    def groups(self, device: torch.device) -> list[tuple[int, Rows]]:
        """The rows of each adapter, without those of the base; indices are on `device`."""
        if device not in self._groups:
            self._groups[device] = [(one, self._rows(one, device)) for one in self.present]
        return self._groups[device]

    def _rows(self, adapter: int, device: torch.device) -> Rows:
        rows = (self._owners == adapter).nonzero().flatten()
        if len(rows) == len(self._owners):
            return slice(None)  # also of the beams of one row
        first, stop = int(rows[0]), int(rows[-1]) + 1
        return slice(first, stop) if stop - first == len(rows) else upload_columns([rows], device)[0]

    def mask(self, device: torch.device) -> Tensor | None:
        """True where a row (N, `stop` - `first`, 1) does not use an adapter; None if all rows use the same one."""
        if device not in self._masks:
            one = len({*self.adapters}) == 1
            owners = None if one else upload_columns([self._owners - self.first], device)[0]
            steps = torch.arange(self.stop - self.first, device=device)
            self._masks[device] = None if owners is None else (owners[:, None] != steps).unsqueeze(-1)
        return self._masks[device]


class LoraLinear:
    """Low-rank terms of one fused linear layer: `parts[adapter][k]` are those of its k-th part, None if not adapted.

    On CUDA, where the launches of small products take longer than the products, `stacked` holds the matrices of all
    adapters: A (adapters, K * R, in) and block-diagonal B (out, adapters, K * R). A decode step then has one product
    each, after which the terms of other adapters are masked.
    """

    def __init__(self, parts: Sequence[Sequence[Pair | None]], sizes: Sequence[int], *, stack: bool) -> None:
        self.parts = [list(each) for each in parts]
        self.sizes = list(sizes)
        self._columns = [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]
        self._stacked = self._stack() if stack else None

    def add(self, out: Tensor, x: Tensor, step: LoraStep) -> Tensor:
        """Add the terms of inputs x (N, in) to outputs (N, out), in place."""
        dense = not step.is_packed and step.stop - step.first <= 2 * len(step.present)
        if self._stacked is not None and dense:
            return self._add_stacked(out, x, step)
        for adapter, rows in step.groups(x.device):
            inputs = x[rows]
            for columns, pair in zip(self._columns, self.parts[adapter], strict=True):
                if pair is not None:
                    out[rows, columns] += F.linear(F.linear(inputs, pair[0]), pair[1])
        return out

    def _add_stacked(self, out: Tensor, x: Tensor, step: LoraStep) -> Tensor:
        assert self._stacked is not None
        chosen = slice(step.first - 1, step.stop - 1)
        inner = F.linear(x, self._stacked[0][chosen].flatten(0, 1))  # (N, adapters * K * R)
        mask = step.mask(x.device)
        if mask is not None:
            inner.view(len(x), step.stop - step.first, -1).masked_fill_(mask, 0)  # also where it is infinite
        return out.addmm_(inner, self._stacked[1][:, chosen].flatten(1).t())

    def _stack(self) -> Pair | None:
        """The stacked matrices, of which `parts` become views; None if no adapter has terms here."""
        pairs = [pair for each in self.parts for pair in each if pair is not None]
        if not pairs:
            return None
        like, count = pairs[0][0], len(self.sizes)
        rank = max(len(pair[0]) for pair in pairs)
        down = like.new_zeros(len(self.parts) - 1, count, rank, like.shape[1])
        up = like.new_zeros(sum(self.sizes), len(self.parts) - 1, count, rank)
        for adapter, each in enumerate(self.parts[1:]):
            for k, pair in enumerate(each):
                if pair is not None:
                    views = down[adapter, k, : len(pair[0])], up[self._columns[k], adapter, k, : len(pair[0])]
                    each[k] = (views[0].copy_(pair[0]), views[1].copy_(pair[1]))
        return down.flatten(1, 2), up.flatten(2)


class LoraWeights:
    """The low-rank matrices of some adapters in the dtype of a model, on the devices of its layers."""

    def __init__(self, model: nn.Module, adapters: Sequence[LoraAdapter], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.modules = {name: model.get_submodule(name) for adapter in adapters for name in adapter.weights}
        self.pairs: list[dict[str, Pair]] = [{}, *(self._padded(adapter) for adapter in adapters)]
        self._last: LoraStep | None = None

    def _padded(self, adapter: LoraAdapter) -> dict[str, Pair]:
        rank = max(len(down) for down, _ in adapter.weights.values())
        rank = -(-rank // RANKS) * RANKS
        padded = {}
        for name, (down, up) in adapter.weights.items():
            missing = rank - len(down)
            both = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
            device = next(self.modules[name].parameters()).device
            padded[name] = (both[0].to(device, self.dtype), both[1].to(device, self.dtype))
        return padded

    def step(self, adapters: Sequence[int], seqlens: Sequence[int] | None = None) -> LoraStep | None:
        """The adapters of a forward pass, None if all rows use the base. That of the last decode step is kept."""
        if not any(adapters):
            return None
        if seqlens is not None:
            return LoraStep(adapters, seqlens)
        if self._last is None or self._last.adapters != tuple(adapters):
            self._last = LoraStep(adapters)
        return self._last

    def fuse(self, names: Sequence[str], sizes: Sequence[int], *, stack: bool) -> LoraLinear:
        """The terms of a fused linear layer of the modules `names`."""
        linear = LoraLinear([[each.get(name) for name in names] for each in self.pairs], sizes, stack=stack)
        for each, parts in zip(self.pairs, linear.parts, strict=True):
            each.update({name: pair for name, pair in zip(names, parts, strict=True) if pair is not None})
        return linear

    @contextmanager
    def hooked(self, step: LoraStep) -> Iterator[None]:
        """Add the terms in transformers' forward pass, whose inputs are (rows, T, in)."""

        def hook_of(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
                for adapter, rows in step.groups(out.device):
                    if (pair := self.pairs[adapter].get(name)) is not None:
                        out[rows] += F.linear(F.linear(inputs[0][rows], pair[0]), pair[1])

            return module.register_forward_hook(add)

        handles = [hook_of(name, module) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
