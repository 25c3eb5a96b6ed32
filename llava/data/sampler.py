"""Batches of like lengths and of one modality (spec/train.md §6).

All ranks must draw the same order: either from an equal global random state, as published, or from a generator that
`LengthGroupedSampler` seeds by epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

Indices = npt.NDArray[np.int64]
FULL: Final = 2**62  # more than any sum of lengths: a chunk with it takes no more


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
    return _listed(_length_grouped(np.asarray(lengths, np.int64), batch_size, world_size, generator))


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """As above, with image samples (positive lengths) and text samples (negative or zero) in megabatches of their own.

    At most two megabatches mix them: the first, and a shorter last one. One modality alone is grouped by length.
    """
    signed = np.asarray(lengths, np.int64)
    sizes = np.abs(signed)
    image, text = np.flatnonzero(signed > 0), np.flatnonzero(signed <= 0)
    if not len(image) or not len(text):
        return _listed(_length_grouped(sizes, batch_size, world_size, generator))
    megabatch = batch_size * world_size
    pure: list[Indices] = []
    rest: list[Indices] = []
    for group in (image, text):
        order = group[_length_grouped(sizes[group], batch_size, world_size, generator)]
        *whole, last = np.split(order, range(megabatch, len(order), megabatch))
        pure += whole
        rest.append(last)
    pure = [pure[i] for i in torch.randperm(len(pure), generator=generator).tolist()]
    mixed = np.concatenate(rest)
    if len(mixed) >= megabatch:
        pure.insert(0, mixed[:megabatch])
        mixed = mixed[megabatch:]
    return _listed(np.concatenate([*pure, mixed]))


def _listed(order: Indices) -> list[int]:
    numbers: list[int] = order.tolist()
    return numbers


def _length_grouped(lengths: Indices, batch_size: int, world_size: int, generator: torch.Generator | None) -> Indices:
    megabatch = batch_size * world_size
    order: Indices = torch.randperm(len(lengths), generator=generator).numpy()
    whole = len(order) // megabatch * megabatch
    runs: Indices = order[:whole].reshape(-1, megabatch)
    longest_first = np.argsort(-lengths[runs], axis=1, kind="stable")
    runs = _deal(np.take_along_axis(runs, longest_first, 1), lengths, world_size)
    last = sorted(order[whole:].tolist(), key=lambda i: -lengths[i])
    chunks = split_to_even_chunks(last, lengths, world_size)  # type: ignore[arg-type]
    return np.concatenate([runs.reshape(-1), *(np.asarray(chunk, np.int64) for chunk in chunks)])


def _deal(runs: Indices, lengths: Indices, num_chunks: int) -> Indices:
    """`split_to_even_chunks` of every row of `runs` `(R, M)` at once, M a multiple of the chunks: `(R, M)`."""
    size = runs.shape[1] // num_chunks
    row = np.arange(len(runs))
    totals = np.zeros((len(runs), num_chunks), np.int64)
    filled = np.zeros_like(totals)
    dealt = np.empty_like(runs)
    for index in runs.T:
        chunk = totals.argmin(axis=1)
        dealt[row, chunk * size + filled[row, chunk]] = index
        filled[row, chunk] += 1
        totals[row, chunk] += np.where(filled[row, chunk] < size, lengths[index], FULL)
    return dealt


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
