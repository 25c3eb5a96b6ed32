"""Batched host/device transfers of small tensors and numbers, with at most one synchronization each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from llava.placement import to_device

Numbers = Sequence[int] | Sequence[float] | Tensor

ALIGNMENT: Final = 8  # bytes; the size of the largest element


def to_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copy integer or boolean tensors `(B, n_i)` to the CPU in a single transfer, as int64.

    Waits for the device once, for any number of tensors. CPU tensors and `None` are returned unchanged.
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
    sizes = [-(-len(part) // ALIGNMENT) * ALIGNMENT for part in parts]
    packed = torch.empty(sum(sizes), dtype=torch.uint8)
    for part, room in zip(parts, torch.split(packed, sizes), strict=True):
        room[: len(part)] = part
    sent = torch.split(to_device(packed, device), sizes)
    return [
        room[: len(part)].view(tensor.dtype).view(tensor.shape)
        for tensor, part, room in zip(tensors, parts, sent, strict=True)
    ]


def upload_columns(columns: Sequence[Numbers], device: torch.device) -> list[Tensor]:
    """Copy sequences of numbers, which may differ in length, to `device` like `upload`.

    Floats become float32; integers become int64, on CUDA int32 (also valid as indices).
    """
    integers = torch.int32 if device.type == "cuda" else torch.int64
    tensors = [torch.as_tensor(one, dtype=torch.float32 if _is_float(one) else integers) for one in columns]
    return upload(tensors, device)


def _is_float(column: Numbers) -> bool:
    return column.is_floating_point() if isinstance(column, Tensor) else isinstance(column[0], float)
