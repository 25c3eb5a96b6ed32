"""Packing: the rows of an optimizer step are dealt over ranks and micro-batches within a budget of tokens.

Which rows a step has, and their weights, do not depend on it. Ranks wait for each other in every round (the m-th
micro-batch of all ranks), so all have the same number of micro-batches, with balanced FLOPs in each round and in total.
Every rank computes the deal by itself; integer arithmetic makes it the same on all of them.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from llava.errors import ConfigError
from llava.train.flops import Shape, Trainable, row_flops, shape_of
from llava.train.steps import Deal
from llava.train.throughput import trainable_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
Integers = npt.NDArray[np.int64]
SCALE: Final = 2.0**32  # of the most expensive row; totals stay below 2 ** 63
MOVES_PER_BIN: Final = 16


def deal(tokens: Sequence[int], cost: Sequence[float], ranks: int, budget: int) -> Deal:
    """Deal rows 0 … n - 1 of `tokens` positions and `cost` FLOPs: micro-batches of each rank, longest row first.

    All ranks get the same number of micro-batches, as few as the heuristic finds, each of at most `budget` tokens. A
    longer row is a micro-batch by itself. A micro-batch is empty only if there are fewer rows than micro-batches.
    """
    sizes = np.asarray(tokens, np.int64)
    costs = np.asarray(cost, np.float64)
    weights = (costs / (costs.max(initial=0.0) or 1.0) * SCALE).astype(np.int64)
    rounds = _rounds(_pack(sizes, ranks, budget), weights, ranks)
    totals = [0] * ranks
    dealt: Deal = [[] for _ in range(ranks)]
    for members in rounds:
        bins = _level(members, weights, sizes, budget)
        loads = [int(weights[rows].sum()) for rows in bins]
        heaviest = sorted(range(ranks), key=lambda place: -loads[place])
        for place, rank in zip(heaviest, sorted(range(ranks), key=totals.__getitem__)):
            dealt[rank].append(sorted(bins[place], key=lambda row: (-sizes[row], row)))
            totals[rank] += loads[place]
    return dealt


def _pack(sizes: Integers, ranks: int, budget: int) -> list[list[int]]:
    """Rows by micro-batch, a multiple of `ranks` micro-batches, of similar token counts."""
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    alone = int((sizes > budget).sum())
    rest = order[alone:]
    total = int(sizes[rest].sum())
    count = max(1, -(-(alone + -(-total // budget)) // ranks))  # micro-batches of a rank
    while True:
        free = count * ranks - alone
        bins = _longest_first(rest, sizes, free) if free else []
        bins = _level(bins, sizes, sizes, budget, stop=budget)
        if all(sizes[rows].sum() <= budget for rows in bins) and (free or not rest):
            return [*([row] for row in order[:alone]), *bins]
        count += 1


def _longest_first(order: Iterable[int], sizes: Integers, count: int) -> list[list[int]]:
    """Longest processing time first: each row joins the bin of the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, place) for place in range(count)]
    for row in order:
        load, place = heap[0]
        bins[place].append(row)
        heapq.heapreplace(heap, (load + int(sizes[row]), place))
    return bins


def _rounds(bins: list[list[int]], weights: Integers, ranks: int) -> list[list[list[int]]]:
    """Groups of `ranks` bins of similar cost, the heaviest first, so that the first one has the peak memory."""
    heaviest = sorted(bins, key=lambda rows: -int(weights[rows].sum()))
    return [heaviest[start : start + ranks] for start in range(0, len(heaviest), ranks)]


def _level(bins: list[list[int]], weights: Integers, sizes: Integers, budget: int, *, stop: int = 0) -> list[list[int]]:
    """Lower the largest total weight to `stop` by moves and exchanges of rows that keep bins within the budget.

    A bin above the budget may only shrink. Each step makes the best change of the heaviest bin.
    """
    count = len(bins)
    rows = np.array([row for members in bins for row in members], np.int64)
    # Partners of an exchange are all rows, and an imaginary one without weight of each bin.
    place = np.array([*(at for at, members in enumerate(bins) for _ in members), *range(count)], np.int64)
    weight, size = (np.concatenate([values[rows], np.zeros(count, np.int64)]) for values in (weights, sizes))
    load, used = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.add.at(load, place, weight)
    np.add.at(used, place, size)
    for _ in range(MOVES_PER_BIN * count):
        heaviest = int(load.argmax())
        if load[heaviest] <= stop:
            break
        mine = np.flatnonzero(place[: len(rows)] == heaviest)
        moved = weight[mine][:, None] - weight  # (rows of the bin, partners)
        shifted = size[mine][:, None] - size
        highest = np.maximum(load[heaviest] - moved, load[place] + moved)
        fits = used[place] + shifted <= np.maximum(budget, used[place])
        fits &= used[heaviest] - shifted <= max(budget, used[heaviest])
        highest[~fits | (place == heaviest)] = load[heaviest]
        best = int(highest.argmin()) if highest.size else 0
        if not highest.size or highest.flat[best] >= load[heaviest]:
            break
        row, partner = divmod(best, len(place))
        other = int(place[partner])
        for total, values in ((load, moved), (used, shifted)):
            total[heaviest] -= values[row, partner]
            total[other] += values[row, partner]
        place[mine[row]] = other
        if partner < len(rows):
            place[partner] = heaviest
    changed: list[list[int]] = [[] for _ in range(count)]
    for row, at in zip(rows.tolist(), place.tolist()):
        changed[at].append(row)
    return changed


class MeasuredDataset(Protocol):
    """A data set that knows the sizes of its records without loading them."""

    def sizes(self, indices: Sequence[int]) -> npt.NDArray[np.int32]: ...


@dataclass
class Packer:
    """Deals the records of optimizer steps by their FLOPs; `longer` counts records above the budget so far.

    `image_tokens` are the positions of an image in the language model. Without a `shape`, tokens stand for FLOPs.
    """

    dataset: MeasuredDataset
    shape: Shape | None
    trainable: Trainable
    image_tokens: int
    ranks: int
    budget: int
    longer: int = 0

    @classmethod
    def of(cls, dataset: MeasuredDataset, model: PreTrainedModel, ranks: int, budget: int) -> Packer:
        """The packer of a run; raises `ConfigError` for a language model that pads its batches."""
        if not getattr(model, "supports_packing", False):
            raise ConfigError(
                f"--micro_batch_tokens needs a language model without padding, which {type(model).__name__} is not; "
                "drop the flag, and set --per_device_train_batch_size."
            )
        tower = model.get_vision_tower()
        image_tokens = int(model.num_image_tokens) if tower is not None else 0
        return cls(dataset, shape_of(model.config, tower), trainable_parts(model), image_tokens, ranks, budget)

    def measure(self, indices: Sequence[int]) -> tuple[Integers, npt.NDArray[np.float64]]:
        """Positions with images expanded, and FLOPs, of records."""
        ids, images = self.dataset.sizes(indices).astype(np.int64).T
        positions = ids + images * (self.image_tokens - 1)
        if self.shape is None:
            return positions, positions.astype(np.float64)
        return positions, row_flops(self.shape, self.trainable, positions, images)

    def deal(self, indices: Sequence[int]) -> Deal:
        """Micro-batches of each rank, as indices of the data set; see `deal`."""
        positions, flops = self.measure(indices)
        longer = np.flatnonzero(positions > self.budget)
        if len(longer) and not self.longer:
            logger.warning(
                "Record %d has %d tokens, more than --micro_batch_tokens %d; such a record is a micro-batch by itself.",
                *(indices[longer[0]], positions[longer[0]], self.budget),
            )
        self.longer += len(longer)
        dealt = deal(positions.tolist(), flops.tolist(), self.ranks, self.budget)
        return [[[indices[row] for row in rows] for rows in batches] for batches in dealt]
