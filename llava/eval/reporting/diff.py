"""Differences between two runs: settings, versions, scores, and answers to the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llava.eval.reporting.data import Run, format_score, markdown_table
from llava.eval.run.answers import read_complete_lines, row_key
from llava.eval.run.files import Record
from llava.eval.run.manifest import read_manifest

EXAMPLES: Final = 5
SKIPPED: Final = ("asked", "seconds", "keys", "shards", "environment.command", "status")


def diff_runs(first: Run, second: Run) -> str:
    """The differences as Markdown."""
    parts = [f"# {first.folder} and {second.folder}"]
    for task in first.scores:
        if task in second.scores:
            parts += _diff_task(task, first, second)
    for run, other in ((first, second), (second, first)):
        only = [task for task in run.scores if task not in other.scores]
        if only:
            parts.append(f"Only in {run.folder}: {', '.join(only)}.")
    return "\n\n".join(parts)


def _diff_task(task: str, first: Run, second: Run) -> Iterator[str]:
    before, after = (run.scores[task].get("primary_metric") for run in (first, second))
    change = None if before is None or after is None else after - before
    yield f"## {task}: {format_score(before)} and {format_score(after)} ({format_score(change, signed=True)})"
    paths = [run.folder / task / "answers.jsonl" for run in (first, second)]
    left, right = (_flatten(read_manifest(path) or {}) for path in paths)
    rows = [
        [key, _shorten(left.get(key)), _shorten(right.get(key))]
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not key.startswith(SKIPPED)
    ]
    yield markdown_table(["setting", "first", "second"], rows) if rows else "Equal settings and versions."
    yield _diff_answers(*paths)


def _diff_answers(first: Path, second: Path) -> str:
    """The number of changed answers, and examples."""
    before = {row_key(row): str(row["text"]) for row in read_complete_lines(first)}
    after = {row_key(row): str(row["text"]) for row in read_complete_lines(second)}
    common = [key for key in before if key in after]
    changed = [key for key in common if before[key] != after[key]]
    text = f"{len(changed)} of {len(common)} answers to the same questions differ."
    if not changed:
        return text
    rows = [[_shorten(key[0]), _shorten(before[key]), _shorten(after[key])] for key in changed[:EXAMPLES]]
    return f"{text}\n\n" + markdown_table(["question", "first", "second"], rows)


def _flatten(content: Record, prefix: str = "") -> dict[str, object]:
    """A nested dictionary with its keys joined by periods."""
    flat: dict[str, object] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
