"""Sampling grouped by length and modality.

All ranks must draw the same order, from equal global random states as published, or from generators that
`LengthGroupedSampler` seeds by epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

Indices = npt.NDArray[np.int64]
FULL: Final = 2**62  # added to the total of a full chunk; exceeds any sum of lengths


def split_to_even_chunks(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Split `indices` into `num_chunks` chunks of equal size and similar total length, in the given order."""
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
    """A permutation of the indices in megabatches of `batch_size * world_size`, split evenly among ranks by length."""
    return cast("list[int]", _length_grouped(np.asarray(lengths, np.int64), batch_size, world_size, generator).tolist())


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Length-grouped indices with separate megabatches of image (positive lengths) and text samples (others).

    At most two megabatches are mixed: the first, and a shorter last one.
    """
    signed = np.asarray(lengths, np.int64)
    sizes = np.abs(signed)
    image, text = np.flatnonzero(signed > 0), np.flatnonzero(signed <= 0)
    if not len(image) or not len(text):
        return cast("list[int]", _length_grouped(sizes, batch_size, world_size, generator).tolist())
    megabatch = batch_size * world_size
    single: list[Indices] = []
    rest: list[Indices] = []
    for group in (image, text):
        order = group[_length_grouped(sizes[group], batch_size, world_size, generator)]
        *whole, last = np.split(order, range(megabatch, len(order), megabatch))
        single += whole
        rest.append(last)
    single = [single[i] for i in torch.randperm(len(single), generator=generator).tolist()]
    mixed = np.concatenate(rest)
    if len(mixed) >= megabatch:
        single.insert(0, mixed[:megabatch])
        mixed = mixed[megabatch:]
    return cast("list[int]", np.concatenate([*single, mixed]).tolist())


def _length_grouped(lengths: Indices, batch_size: int, world_size: int, generator: torch.Generator | None) -> Indices:
    megabatch = batch_size * world_size
    order: Indices = torch.randperm(len(lengths), generator=generator).numpy()
    whole = len(order) // megabatch * megabatch
    batches: Indices = order[:whole].reshape(-1, megabatch)
    longest_first = np.argsort(-lengths[batches], axis=1, kind="stable")
    batches = _split_rows(np.take_along_axis(batches, longest_first, 1), lengths, world_size)
    last = sorted(order[whole:].tolist(), key=lambda i: -lengths[i])
    chunks = split_to_even_chunks(last, lengths, world_size)  # type: ignore[arg-type]
    return np.concatenate([batches.reshape(-1), *(np.asarray(chunk, np.int64) for chunk in chunks)])


def _split_rows(indices: Indices, lengths: Indices, num_chunks: int) -> Indices:
    """Vectorized `split_to_even_chunks` of each row of `indices` (R, M), with M a multiple of `num_chunks`: (R, M)."""
    size = indices.shape[1] // num_chunks
    row = np.arange(len(indices))
    totals = np.zeros((len(indices), num_chunks), np.int64)
    filled = np.zeros_like(totals)
    split = np.empty_like(indices)
    for index in indices.T:
        chunk = totals.argmin(axis=1)
        split[row, chunk * size + filled[row, chunk]] = index
        filled[row, chunk] += 1
        totals[row, chunk] += np.where(filled[row, chunk] < size, lengths[index], FULL)
    return split


class LengthGroupedSampler(Sampler[int]):
    """Yields every index once in length-grouped, optionally modality-grouped order.

    With `seed`, the order of epoch e is drawn from a generator seeded with `seed + e` (see `set_epoch`); otherwise from
    `generator` or the global random state.
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
            raise ValueError("lengths must be given to LengthGroupedSampler; pass dataset.modality_lengths.")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of `epoch`; the data loader calls it on every rank."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
        group = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(group(self.lengths, self.batch_size, self.world_size, generator))
