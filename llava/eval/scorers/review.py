"""Judged reviews: reading the two scores, and their means per category (spec/eval.md §5). Published: `all`'s ratio.

The first score is the reference answer's, the second the model's. A judgement without scores is `[-1, -1]`: it is left
out and counted (defect M13).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llava.errors import ConfigError, DataError
from llava.eval.files import read_rows

logger = logging.getLogger(__name__)

FAILED: Final = (-1, -1)
_NUMBER: Final = r"(\d+(?:\.\d+)?)(?:/10)?"
SCORES: Final = re.compile(rf"\s*[(\[]?\s*{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}\s*[)\]]?\s*")
PREFIXES: Final = ("gpt4_text", "reviews_", "review_")


def parse_scores(reply: str) -> tuple[float, float] | tuple[int, int]:
    """Two numbers on the first line that has text, or (mathematics) a tuple on the last; else `FAILED` (M12)."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    candidates = lines[:1] + [line for line in lines[-1:] if line.startswith(("(", "["))]
    for line in candidates:
        match = SCORES.fullmatch(line)
        if match:
            return float(match[1]), float(match[2])
    return FAILED


def score(reviews: Sequence[Mapping[str, Any]], ignore: Collection[int] = ()) -> dict[str, Any]:
    """Means of both scores per category and for `all`; `n_failed` counts judgements without scores."""
    groups: dict[str, list[Sequence[float]]] = {}
    failed = 0
    for review in reviews:
        if review.get("question_id") in ignore:
            continue
        pair = review.get("tuple", review.get("score"))
        if pair is None or len(pair) != 2:
            raise DataError(f"Review {review.get('id')!r} has neither 'tuple' nor 'score' with two numbers.")
        if tuple(pair) == FAILED:
            failed += 1
            continue
        for name in filter(None, ("all", review.get("category"))):
            groups.setdefault(name, []).append(pair)
    means = {
        name: [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
        for name, pairs in sorted(groups.items())
    }
    return {"n_failed": failed, "means": means}


def table(result: Mapping[str, Any]) -> str:
    """A line a category: name, 100 · second / first, 10 · first, 10 · second."""
    return "\n".join(
        f"{name} {100 * second / first if first else float('nan'):.1f} {10 * first:.1f} {10 * second:.1f}"
        for name, (first, second) in result["means"].items()
    )


def review_files(folder: Path) -> list[Path]:
    """A folder's files of reviews, by the published naming rule."""
    if not folder.is_dir():
        raise ConfigError(f"--dir {folder} is no folder.")
    everything = "review" in str(folder)
    return sorted(path for path in folder.glob("*.jsonl") if everything or path.name.startswith(PREFIXES))


def summarize(
    dir: Path | None, version: str | None, select: Sequence[str] | None, files: Sequence[Path], ignore: Sequence[int]
) -> str:
    """One block per file: its name and a line a category."""
    if dir is None and not files:
        raise ConfigError("Nothing to summarise: give --dir or --files.")
    paths = list(files) or review_files(Path() if dir is None else dir)
    blocks = []
    for path in paths:
        release = "0613" if "0613" in path.name else "0314"
        if (version and version != release) or not all(part in path.name for part in select or ()):
            continue
        result = score(read_rows(path), ignore)
        if result["n_failed"]:
            logger.warning("%s: %d failed judgement(s) are left out.", path.stem, result["n_failed"])
        blocks.append(f"{path.stem}\n{table(result)}\n" + "=" * 33)
    if not blocks:
        raise ConfigError("No file of reviews matches; correct --dir, --version or --select.")
    return "\n".join(blocks)
