"""Host-device transfers of small integer tensors, batched so that a step waits for the device at most once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copy integer or boolean tensors `(B, n_i)` to the CPU in a single transfer, as int64.

    The copy waits for the device once, however many tensors are given. Tensors that are on the CPU already, and
    `None`, are returned as they are.
    """
    remote = [tensor for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    if not remote:
        return list(tensors)
    joined = torch.cat([tensor.to(remote[0].device, torch.long) for tensor in remote], dim=1).cpu()
    parts = iter(torch.split(joined, [tensor.shape[1] for tensor in remote], dim=1))
    return [tensor if tensor is None or tensor.device.type == "cpu" else next(parts) for tensor in tensors]


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy integer or boolean CPU tensors of any shape to `device` in a single transfer; dtypes are kept.

    On CUDA the host does not wait: the driver stages pageable memory before the call returns, so the source may be
    freed at once. Other backends may read the source later and copy synchronously.
    """
    if device.type == "cpu":
        return list(tensors)
    joined = torch.cat([tensor.reshape(-1).long() for tensor in tensors])
    sent = joined.to(device, non_blocking=device.type == "cuda")
    parts = torch.split(sent, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
