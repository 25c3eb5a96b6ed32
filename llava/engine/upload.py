"""The numbers of a step (token ids, positions, indices, sampling parameters), sent to the device in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.placement import to_device

Numbers = Sequence[int] | Sequence[float] | Tensor


def upload_columns(columns: Sequence[Numbers], device: torch.device) -> list[Tensor]:
    """`columns`, each of a length of its own, as tensors on `device`: integers, or float32 for floats.

    To CUDA they travel as one pinned buffer of 32-bit numbers, and the host does not wait.
    """
    integers = torch.int32 if device.type == "cuda" else torch.int64  # not every device takes 32-bit indices
    tensors = [torch.as_tensor(one, dtype=torch.float32 if _is_float(one) else integers) for one in columns]
    if device.type != "cuda" or not tensors:
        return [one.to(device) for one in tensors]
    packed = torch.cat([one.view(torch.int32) for one in tensors])
    parts = torch.split(to_device(packed, device), [len(one) for one in tensors])
    return [part.view(one.dtype) for part, one in zip(parts, tensors, strict=True)]


def _is_float(column: Numbers) -> bool:
    return column.is_floating_point() if isinstance(column, Tensor) else isinstance(column[0], float)
