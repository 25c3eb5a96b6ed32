"""Access to parameters partitioned over the ranks by DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], modifier_rank: int | None = 0) -> Iterator[None]:
    """Gather `parameters` on every rank; changes by rank `modifier_rank` are broadcast on exit.

    Without ZeRO-3, does nothing and does not import DeepSpeed.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield
