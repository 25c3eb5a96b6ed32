"""Scores of single answers, and their file `outcomes.jsonl` beside the answers.

Line n of the file belongs to line n of the answers. It has the question's `id`, which does not depend on the prompt,
its `image`, the `unit` of questions that are scored together (the rotations of MMBench, the pairs of MME),
and the `score` of the answer from 0 to 1. `llava.eval.outcomes` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llava.eval.run.files import write_jsonl

FILE: Final = "outcomes.jsonl"


@dataclass(frozen=True)
class Outcome:
    """The score of one answer.

    `groups` are the metrics over subsets of the questions that include this one, as paths in score.json. `values` are
    other numbers of the answer, by the names of their metrics if the default `Task.metrics` reads them.
    """

    id: str
    score: float
    groups: Sequence[str] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""


def write_outcomes(path: Path, rows: Sequence[Outcome], images: Sequence[str]) -> None:
    """Write one JSON object per answer."""
    pairs = zip(rows, images, strict=True)
    write_jsonl(path, [{**vars(row), "score": float(row.score), "image": image} for row, image in pairs])
