"""Table of the votes on comparisons: how often each model won, from the conversation log."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)
COLUMNS: Final = ("Model", "Votes", "Better", "Worse", "Equally good", "Equally bad", "Win rate, %")
_SCORES: Final = {"leftvote": 1.0, "tievote": 0.5, "bothbad_vote": 0.5, "rightvote": 0.0}


class Ratings:
    """Counts of votes by pair of models, read once from the log and updated with every vote."""

    def __init__(self, directory: Path) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()  # (left, right, kind)
        for kind, models in _recorded(directory):
            self.add(kind, models)

    def add(self, kind: str, models: Sequence[str]) -> None:
        left, right = models
        if left != right:
            self.counts[left, right, kind] += 1

    def rows(self) -> list[list[str | int | float]]:
        """Rows of the table, the best model first; a tie counts half for the win rate."""
        rows: list[list[str | int | float]] = []
        for model in sorted({name for left, right, _ in self.counts for name in (left, right)}):
            found: Counter[str] = Counter()
            points = 0.0
            for (left, right, kind), count in self.counts.items():
                if model in (left, right):
                    score = _SCORES[kind] if model == left else 1 - _SCORES[kind]
                    points += count * score
                    found[kind if score == 0.5 else "better" if score else "worse"] += count
            votes = found.total()
            kinds = [found[kind] for kind in ("better", "worse", "tievote", "bothbad_vote")]
            rows.append([model, votes, *kinds, round(100 * points / votes, 1)])
        return sorted(rows, key=lambda row: (-float(row[-1]), str(row[0])))


def _recorded(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Votes in the log; lines of other programs and damaged ones are skipped."""
    for path in sorted(directory.glob("*-conv.json")) if directory.is_dir() else []:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    models = [str(name) for name in entry["models"]]
                    if entry["type"] in _SCORES and len(models) == 2:
                        yield entry["type"], models
                except (ValueError, KeyError, TypeError):
                    continue
