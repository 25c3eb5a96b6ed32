"""Keys and values of a model that lies on several devices: every layer's are where the layer is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


class SplitLayers:
    """Tensors (layers of one device, …) as one (all layers, …), which can be sliced in all places but the first."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def empty(cls, devices: Sequence[torch.device], shape: Sequence[int], dtype: torch.dtype) -> SplitLayers:
        """Of `shape` behind the layers, whose devices are given; neighbours on one device share a tensor."""
        return cls(
            [torch.empty((len(list(some)), *shape), dtype=dtype, device=device) for device, some in groupby(devices)]
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self.parts)), *self.parts[0].shape[1:]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        """That of the first layer."""
        return self.parts[0].device

    def __getitem__(self, index: Any) -> Any:
        """One layer's tensor for a whole number in the first place, else all layers'."""
        index = index if isinstance(index, tuple) else (index,)
        layer = index[0]
        if not isinstance(layer, int):
            return SplitLayers([part[index] for part in self.parts])
        for part in self.parts:
            if layer < len(part):
                return part[(layer, *index[1:])]
            layer -= len(part)
        raise IndexError(f"layer {index[0]} of {self.shape[0]}")

    def __setitem__(self, index: Any, value: Any) -> None:
        for at, part in enumerate(self.parts):
            part[index] = value.parts[at] if isinstance(value, SplitLayers) else value

    def clone(self) -> SplitLayers:
        return SplitLayers([part.clone() for part in self.parts])
