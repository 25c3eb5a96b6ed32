"""Outcomes of a run as numpy columns, from which metrics and intervals are computed; scorers do without numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llava.errors import DataError
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.run.files import read_rows
from llava.eval.uncertainty import Floats, Metric, ratio

Codes: TypeAlias = NDArray[np.intp]
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes as columns. `images` and `units` are numbers; a value is NaN where an answer has none."""

    ids: Sequence[str]
    images: Codes
    units: Codes
    scores: Floats
    groups: Mapping[str, Mask]
    values: Mapping[str, Floats]

    @classmethod
    def of(cls, rows: Sequence[Outcome], images: Sequence[str]) -> Outcomes:
        """Columns of outcomes and their images; a question without an image is a cluster of its own."""
        clusters = [image or f"\0{row.id}" for row, image in zip(rows, images, strict=True)]
        groups = dict.fromkeys(name for row in rows for name in row.groups)
        values = dict.fromkeys(name for row in rows for name in row.values)
        members = [frozenset(row.groups) for row in rows]
        return cls(
            [row.id for row in rows],
            _codes(clusters),
            _codes([row.unit or row.id for row in rows]),
            np.array([row.score for row in rows], dtype=np.float64),
            {name: np.array([name in found for found in members]) for name in groups},
            {name: np.array([row.values.get(name, np.nan) for row in rows], dtype=np.float64) for name in values},
        )

    def take(self, rows: Codes | Mask) -> Outcomes:
        """The outcomes at these positions."""
        positions = np.arange(len(self.ids))[rows]
        return Outcomes(
            [self.ids[at] for at in positions], self.images[rows], self.units[rows], self.scores[rows],
            {name: mask[rows] for name, mask in self.groups.items()},
            {name: column[rows] for name, column in self.values.items()},
        )  # fmt: skip

    def by_unit(self) -> Outcomes:
        """One outcome per unit: correct if all its answers are, with the other fields of its first answer."""
        _, first, codes = np.unique(self.units, return_index=True, return_inverse=True)
        right = np.bincount(codes, self.scores == 1) == np.bincount(codes)
        return replace(self.take(first), scores=right.astype(np.float64))

    def sums(self, *columns: Floats | Mask) -> Floats:
        """Sums of columns over the answers to each image, of shape (images, columns)."""
        return np.stack([np.bincount(self.images, column, int(self.images.max()) + 1) for column in columns], axis=1)

    def mean(self, name: str, values: Floats | None = None, group: str | None = None, scale: float = 100.0) -> Metric:
        """`scale` times the mean of values from 0 to 1 (default: the scores) over the answers of a group."""
        values = self.scores if values is None else values
        members = ~np.isnan(values) if group is None else self.groups[group] & ~np.isnan(values)
        sums = self.sums(np.where(members, values, 0.0), members)
        return Metric(name, sums, ratio(scale), (0.0, scale))


def _codes(labels: Sequence[str]) -> Codes:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.intp)


def read_outcomes(path: Path) -> Outcomes:
    """Read the file. Raises `DataError` if a run has none, because an older version scored it."""
    if not path.is_file():
        raise DataError(f"{path} is missing; score the run again: llava eval ... --score-only.")
    rows = read_rows(path, "id", "image", "score", "groups", "values", "unit")
    images = [row.pop("image") for row in rows]
    return Outcomes.of([Outcome(**row) for row in rows], images)


def pair(first: Outcomes, second: Outcomes) -> tuple[Outcomes, Outcomes]:
    """The answers of two runs to the questions that both answered, in the order of the first.

    Both have the first run's images, units and groups. Raises `DataError` if they have no question in common.
    """
    positions = {each: at for at, each in enumerate(second.ids)}
    common = [(at, positions[each]) for at, each in enumerate(first.ids) if each in positions]
    if not common:
        raise DataError("The runs have no question in common; compare runs of the same benchmark and split.")
    left, right = (np.array(rows, dtype=np.intp) for rows in zip(*common))
    before, after = first.take(left), second.take(right)
    return before, replace(after, images=before.images, units=before.units, groups=before.groups)
