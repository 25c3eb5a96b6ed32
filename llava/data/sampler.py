"""Batches of like lengths and of one modality (spec/train.md §6).

All ranks must draw the same order: either from an equal global random state, as published, or from a generator that
`LengthGroupedSampler` seeds by epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """`indices` dealt into `num_chunks` lists of about equal total length, in order of arrival."""
    if len(indices) % num_chunks:
        return [indices[chunk::num_chunks] for chunk in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0] * num_chunks
    for index in indices:
        chunk = min((c for c in range(num_chunks) if len(chunks[c]) < size), key=totals.__getitem__)
        chunks[chunk].append(index)
        totals[chunk] += lengths[index]
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """A permutation of the indices whose megabatches of `batch_size * world_size` are dealt evenly to the ranks."""
    megabatch = batch_size * world_size
    order = torch.randperm(len(lengths), generator=generator).tolist()
    runs = [sorted(run, key=lambda i: lengths[i], reverse=True) for run in _cut(order, megabatch)]
    return [index for run in runs for chunk in split_to_even_chunks(run, lengths, world_size) for index in chunk]


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """As above, with image samples (positive lengths) and text samples (negative or zero) in megabatches of their own.

    At most two megabatches mix them: the first, and a shorter last one. One modality alone is grouped by length.
    """
    sizes = [abs(length) for length in lengths]
    image = [index for index, length in enumerate(lengths) if length > 0]
    text = [index for index, length in enumerate(lengths) if length <= 0]
    if not image or not text:
        return get_length_grouped_indices(sizes, batch_size, world_size, generator)
    megabatch = batch_size * world_size
    pure: list[list[int]] = []
    mixed: list[int] = []
    for group in (image, text):
        order = get_length_grouped_indices([sizes[i] for i in group], batch_size, world_size, generator)
        runs = _cut([group[i] for i in order], megabatch)
        mixed += runs.pop()
        pure += runs
    pure = [pure[i] for i in torch.randperm(len(pure), generator=generator).tolist()]
    if len(mixed) >= megabatch:
        pure.insert(0, mixed[:megabatch])
        mixed = mixed[megabatch:]
    return [index for run in [*pure, mixed] for index in run]


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class LengthGroupedSampler(Sampler[int]):
    """Deals every index once in length-grouped (optionally modality-grouped) order.

    With `seed`, epoch e draws from a generator seeded with `seed + e` (see `set_epoch`); else from `generator`, or
    from the global random state.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
        seed: int | None = None,
    ) -> None:
        if lengths is None:
            raise ValueError("LengthGroupedSampler needs the lengths of the samples; pass dataset.modality_lengths.")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; the data loader calls it on every rank alike."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
        group = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(group(self.lengths, self.batch_size, self.world_size, generator))
