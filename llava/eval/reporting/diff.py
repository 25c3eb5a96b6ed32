"""What differs between two runs: settings, versions, scores, and answers to the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from llava.eval.reporting.data import Run, markdown_table, number
from llava.eval.run.answers import key_of, written_rows
from llava.eval.run.manifest import read_manifest

EXAMPLES: Final = 5
SKIPPED: Final = ("asked", "seconds", "keys", "shards", "environment.command", "status")


def difference(first: Run, second: Run) -> str:
    """A page of Markdown."""
    parts = [f"# {first.folder} and {second.folder}"]
    for task in first.scores:
        if task in second.scores:
            parts += _task(task, first, second)
    for one, other in ((first, second), (second, first)):
        only = [task for task in one.scores if task not in other.scores]
        if only:
            parts.append(f"Only in {one.folder}: {', '.join(only)}.")
    return "\n\n".join(parts)


def _task(task: str, first: Run, second: Run) -> Iterator[str]:
    values = [run.scores[task].get("primary_metric") for run in (first, second)]
    both = None not in values
    change = number(values[1] - values[0], signed=True) if both else "–"  # type: ignore[operator]
    yield f"## {task}: {number(values[0])} and {number(values[1])} ({change})"
    paths = [run.folder / task / "answers.jsonl" for run in (first, second)]
    settings = [_flat(read_manifest(path) or {}) for path in paths]
    rows = [
        [key, _short(settings[0].get(key)), _short(settings[1].get(key))]
        for key in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(key) != settings[1].get(key) and not key.startswith(SKIPPED)
    ]
    yield markdown_table(["setting", "first", "second"], rows) if rows else "Equal settings and versions."
    yield _answers(*paths)


def _answers(first: Path, second: Path) -> str:
    """How many answers changed, and some of them."""
    before = {key_of(row): str(row["text"]) for row in written_rows(first)}
    after = {key_of(row): str(row["text"]) for row in written_rows(second)}
    common = [key for key in before if key in after]
    changed = [key for key in common if before[key] != after[key]]
    text = f"{len(changed)} of {len(common)} answers to the same questions differ."
    if not changed:
        return text
    rows = [[_short(key[0]), _short(before[key]), _short(after[key])] for key in changed[:EXAMPLES]]
    return f"{text}\n\n" + markdown_table(["question", "first", "second"], rows)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by periods."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
