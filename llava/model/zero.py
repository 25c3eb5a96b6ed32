"""Access to parameters that DeepSpeed ZeRO-3 has partitioned over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], modifier_rank: int | None = 0) -> Iterator[None]:
    """Inside, the parameters are whole on every rank; what rank `modifier_rank` writes is what all keep.

    Without ZeRO-3 this does nothing, and DeepSpeed is not imported.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield
