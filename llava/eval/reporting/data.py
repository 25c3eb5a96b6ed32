"""What a report is made of: runs as `llava eval` left them, compared with the published row."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llava.errors import DataError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.published import COLUMNS, Published, band, find
from llava.eval.run.files import read_json

INSIDE: Final = "inside"
OUTSIDE: Final = "outside"
FIELDS: Final = ("run", "task", "split", "questions", "ours", "published", "difference", "band", "verdict")


@dataclass(frozen=True)
class Run:
    """A folder of `llava eval`: the content of each task's `score.json`, by task."""

    name: str
    folder: Path
    scores: Mapping[str, Mapping[str, Any]]
    published: Published | None = None

    @property
    def by_column(self) -> dict[str, Mapping[str, Any]]:
        """Scores that have a column in the published table."""
        columns = {TASKS[task].column: score for task, score in self.scores.items()}
        return {column: columns[column] for column in COLUMNS if column in columns}


def read_run(folder: Path, against: str | None = None) -> Run:
    """Read a run; `against` names the published checkpoint to compare with, by default the model's own name."""
    found = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/score.json"))}
    scores = {task: found[task] for task in TASKS if task in found}
    if not scores:
        raise DataError(f"{folder} has no TASK/score.json; name a folder that llava eval wrote.")
    name = str(next(iter(scores.values()))["model_id"])
    published = find(against or name)
    if published is None and against is not None:
        raise DataError(f"Nothing is published for {against!r}; see docs/Evaluation.md for the names.")
    return Run(name, folder, scores, published)


@dataclass(frozen=True)
class Line:
    """One benchmark of one run; `published` and what follows from it are None where there is nothing to compare."""

    run: str
    task: str
    split: str
    questions: int | None
    ours: float | None
    limit: int | None
    published: float | None = None
    band: float | None = None
    published_questions: int | None = None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.published is None else self.ours - self.published

    @property
    def verdict(self) -> str:
        """Inside or outside the noise band, or why that cannot be said."""
        if self.ours is None:
            return "scored by its server"
        if self.limit is not None:
            return f"only {self.limit} questions"
        if None not in (self.questions, self.published_questions) and self.questions != self.published_questions:
            return f"{self.questions} questions of {self.published_questions}"
        if self.difference is None or self.band is None:
            return "nothing published"
        return INSIDE if abs(self.difference) <= self.band else OUTSIDE


def lines(run: Run) -> list[Line]:
    """A line a task, in the order of the table."""
    made = []
    for task, score in run.scores.items():
        column, split = TASKS[task].column, str(score.get("split", ""))
        official = split == TASKS[task].splits[0]
        value = run.published.scores.get(column) if run.published and column and official else None
        made.append(
            Line(
                run.name, task, split, score.get("questions"), score.get("primary_metric"), score.get("limit"), value,
                None if value is None or column is None else band(column, value), score.get("published_questions"),
            )
        )  # fmt: skip
    return made


def number(value: float | None, signed: bool = False) -> str:
    """One decimal, as published; a dash for none."""
    return "–" if value is None else f"{value:+.1f}" if signed else f"{value:.1f}"


def zoo(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the model-zoo table: each run below its published row, in the published columns."""
    present = [column for column in COLUMNS if any(column in run.by_column for run in runs)]
    rows = []
    for published in dict.fromkeys(run.published for run in runs if run.published is not None):
        facts = [published.method, published.tower, published.llm, str(published.resolution)]
        rows.append(["published", *facts, *(number(published.scores.get(column)) for column in present)])
        rows += [_ours(run, facts, present) for run in runs if run.published == published]
    rows += [_ours(run, [run.name, "", "", ""], present) for run in runs if run.published is None]
    return ["", "model", "tower", "LLM", "res.", *present], rows


def _ours(run: Run, facts: Sequence[str], present: Sequence[str]) -> list[str]:
    found = run.by_column
    return ["ours", *facts, *(number(found.get(column, {}).get("primary_metric")) for column in present)]


def table_of(line: Line) -> list[str]:
    """Base64Images of a line, in the order of `FIELDS`."""
    count = "–" if line.questions is None else f"{line.questions:,}"
    width = "–" if line.band is None else f"±{line.band:.1f}"
    figures = [number(line.ours), number(line.published), number(line.difference, signed=True), width]
    return [line.run, line.task, line.split, count, *figures, line.verdict]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns as wide as their widest cell."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in [header, *rows]]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    texts = ["| " + " | ".join(f"{text:<{width}}" for text, width in zip(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def markdown(runs: Sequence[Run]) -> str:
    """Both tables."""
    parts = ["# Evaluation", markdown_table(*zoo(runs))] if any(run.by_column for run in runs) else ["# Evaluation"]
    rows = [table_of(line) for run in runs for line in lines(run)]
    parts += ["## Ours and published", markdown_table(FIELDS, rows)]
    note = "`inside`: no further from the published score than its noise band (docs/Evaluation.md says how wide it is)."
    return "\n\n".join([*parts, note]) + "\n"


def csv_text(runs: Sequence[Run]) -> str:
    """A line a task of a run, numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*FIELDS, "limit"])
    for run in runs:
        for line in lines(run):
            facts = (line.run, line.task, line.split, line.questions, line.ours, line.published, line.difference)
            writer.writerow([*facts, line.band, line.verdict, line.limit])
    return buffer.getvalue()
