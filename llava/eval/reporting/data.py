"""Data of a report: runs of `llava eval`, the published scores, and their comparison.

A score agrees with a published one within its noise band: one standard error of a proportion over the questions of the
benchmark, and ±20 for MME, which LLaVA's maintainers gave for retraining. The same weights on other hardware differ by
far less.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llava.errors import DataError
from llava.eval.benchmarks.profiles import LLAVA
from llava.eval.benchmarks.registry import TASKS
from llava.eval.run.files import Record, read_json

# questions of each published score: groups of rotations for MMBench, questions with an image for ScienceQA
QUESTIONS: Final = MappingProxyType(
    {
        "VQAv2": 107394, "GQA": 12578, "VizWiz": 8000, "SQA": 2017, "TextVQA": 5000, "POPE": 8910, "MME": 2374,
        "MMB": 1164, "MMB-CN": 1164, "MM-Vet": 218, "SEED": 19242, "LLaVA-Bench": 60,
    }
)  # fmt: skip
COLUMNS: Final = tuple(QUESTIONS)
MME_BAND: Final = 20.0
INSIDE: Final = "inside"
OUTSIDE: Final = "outside"
FIELDS: Final = ("run", "task", "split", "questions", "unread", "ours", "published", "difference", "band", "verdict")
HEADER: Final = (*FIELDS[:6], "95 % CI", "detectable", *FIELDS[6:])  # of the table
UNCERTAINTY: Final = ("low", "high", "standard_error", "detectable", "clusters")  # columns of the CSV file
NOTES: Final = (
    "`95 % CI`: confidence interval of the score; questions about one image are one cluster (docs/Evaluation.md).",
    "`detectable`: the smallest difference from another model, on other questions, that a test detects with a "
    "power of 80 %. Paired comparison on the same questions detects smaller ones.",
    "`inside`: the score is within the noise band of the published one (docs/Evaluation.md defines the band).",
    "`unread`: answers in which the rule of the benchmark finds no answer.",
)


@dataclass(frozen=True)
class Published:
    """A row of the model zoo; `checkpoint` is the hub name without the owner."""

    checkpoint: str
    method: str
    tower: str
    llm: str
    resolution: int
    scores: Mapping[str, float] = field(hash=False)


def _row(checkpoint: str, method: str, tower: str, llm: str, resolution: int, scores: str) -> Published:
    values = map(float, scores.split())
    order = (*COLUMNS[:10], "SEED", "LLaVA-Bench")
    return Published(checkpoint, method, tower, llm, resolution, MappingProxyType(dict(zip(order, values))))


_CHAT: Final = "InternVL-Chat-1.0"

PUBLISHED: Final = (
    _row("llava-v1.5-7b", "LLaVA-1.5", "CLIP-L-336px", "V-7B", 336,
         "78.5 62.0 50.0 66.8 58.2 85.9 1510.7 64.3 58.3 30.5 58.6 65.4"),
    _row("llava-v1.5-13b", "LLaVA-1.5", "CLIP-L-336px", "V-13B", 336,
         "80.0 63.3 53.6 71.6 61.3 85.9 1531.3 67.7 63.6 35.4 61.6 72.5"),
    _row("InternVL-Chat-ViT-6B-Vicuna-7B", _CHAT, "IViT-6B-224px", "V-7B", 336,
         "79.3 62.9 52.5 66.2 57.0 86.4 1525.1 64.6 57.6 31.2"),
    _row("InternVL-Chat-ViT-6B-Vicuna-13B", _CHAT, "IViT-6B-224px", "V-13B", 336,
         "80.2 63.9 54.6 70.1 58.7 87.1 1546.9 66.5 61.9 33.7"),
    _row("InternVL-Chat-ViT-6B-Vicuna-13B-448px", _CHAT, "IViT-6B-448px", "V-13B", 448,
         "82.0 64.1 60.1 71.6 64.8 87.2 1579.0 68.2 64.0 36.7"),
)  # fmt: skip


def find_published(checkpoint: str) -> Published | None:
    """The published row of a checkpoint in any case, None if there is none."""
    return next((row for row in PUBLISHED if row.checkpoint.lower() == checkpoint.lower()), None)


def noise_band(column: str, score: float) -> float:
    """Half-width of the noise band around a published score, in points."""
    if column == "MME":
        return MME_BAND
    proportion = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(proportion * (1 - proportion) / QUESTIONS[column])


@dataclass(frozen=True)
class Run:
    """An output folder of `llava eval` with the content of each `score.json` by task."""

    name: str
    folder: Path
    scores: Mapping[str, Record]
    published: Published | None = None

    @property
    def by_column(self) -> dict[str, Record]:
        """Scores by column of the published table."""
        columns = {TASKS[task].column: score for task, score in self.scores.items()}
        return {column: columns[column] for column in COLUMNS if column in columns}


def read_run(folder: Path, against: str | None = None) -> Run:
    """Read a run and the published row of the checkpoint `against` (default: the model's name)."""
    found = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/score.json"))}
    scores = {task: found[task] for task in TASKS if task in found}
    if not scores:
        raise DataError(f"{folder} has no TASK/score.json; expected an output folder of llava eval.")
    name = str(next(iter(scores.values()))["model_id"])
    published = find_published(against or name)
    if published is None and against is not None:
        raise DataError(f"No published scores for {against!r}; docs/Evaluation.md lists the names.")
    return Run(name, folder, scores, published)


@dataclass(frozen=True)
class Comparison:
    """The score of one task of a run; `published` and `band` are None if there is no published score.

    `interval` is the record of the score's `Interval`, empty if the run has none.
    """

    run: str
    task: str
    split: str
    questions: int | None
    ours: float | None
    limit: int | None
    published: float | None = None
    band: float | None = None
    published_questions: int | None = None
    unread: int | None = None
    interval: Mapping[str, float] = field(default_factory=dict, hash=False)
    prompt_profile: str = LLAVA

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.published is None else self.ours - self.published

    @property
    def verdict(self) -> str:
        """Inside or outside the noise band, or the reason why the scores cannot be compared."""
        if self.ours is None:
            return "scored by its server"
        if self.prompt_profile != LLAVA:
            return f"prompts of {self.prompt_profile}"
        if self.limit is not None:
            return f"only {self.limit} questions"
        if None not in (self.questions, self.published_questions) and self.questions != self.published_questions:
            return f"{self.questions} questions of {self.published_questions}"
        if self.difference is None or self.band is None:
            return "nothing published"
        return INSIDE if abs(self.difference) <= self.band else OUTSIDE

    def cells(self) -> list[str]:
        """The formatted values of `HEADER`."""
        counts = ["–" if count is None else f"{count:,}" for count in (self.questions, self.unread)]
        band = "–" if self.band is None else f"±{self.band:.1f}"
        scores = [format_score(self.published), format_score(self.difference, signed=True)]
        ours = [format_score(self.ours), format_interval(self.interval), "–"]
        if self.interval:
            ours[2] = f"{self.interval['detectable']:.1f}"
        return [self.run, self.task, self.split, *counts, *ours, *scores, band, self.verdict]


def compare(run: Run) -> list[Comparison]:
    """The comparison of each task of a run with its published score."""
    rows = []
    for task, score in run.scores.items():
        column, split = TASKS[task].column, str(score.get("split", ""))
        official = split == next(iter(TASKS[task].layouts))
        published = run.published.scores.get(column) if run.published and column and official else None
        band = None if published is None or column is None else noise_band(column, published)
        questions, limit = score.get("questions"), score.get("limit")
        ours, counts = score.get("primary_metric"), (score.get("published_questions"), score.get("unread"))
        more = score.get("primary_interval") or {}, score.get("prompt_profile", LLAVA)
        rows.append(Comparison(run.name, task, split, questions, ours, limit, published, band, *counts, *more))
    return rows


def format_score(value: float | None, signed: bool = False) -> str:
    """One decimal as published, a dash for None."""
    return "–" if value is None else f"{value:+.1f}" if signed else f"{value:.1f}"


def format_interval(interval: Mapping[str, float]) -> str:
    """Both ends as printed scores; a dash without an interval."""
    return f"{interval['low']:.1f}–{interval['high']:.1f}" if interval else "–"


def model_zoo(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the model zoo table, with each run below its published row."""
    columns = [column for column in COLUMNS if any(column in run.by_column for run in runs)]

    def ours(run: Run, facts: Sequence[str]) -> list[str]:
        scores = run.by_column
        return ["ours", *facts, *(format_score(scores.get(column, {}).get("primary_metric")) for column in columns)]

    rows = []
    for published in dict.fromkeys(run.published for run in runs if run.published is not None):
        facts = [published.method, published.tower, published.llm, str(published.resolution)]
        rows.append(["published", *facts, *(format_score(published.scores.get(column)) for column in columns)])
        rows += [ours(run, facts) for run in runs if run.published == published]
    rows += [ours(run, [run.name, "", "", ""]) for run in runs if run.published is None]
    return ["", "model", "tower", "LLM", "res.", *columns], rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in [header, *rows]]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    texts = ["| " + " | ".join(f"{text:<{width}}" for text, width in zip(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def markdown(runs: Sequence[Run]) -> str:
    """The model zoo table and the comparison table."""
    parts = ["# Evaluation"]
    if any(run.by_column for run in runs):
        parts.append(markdown_table(*model_zoo(runs)))
    rows = [comparison.cells() for run in runs for comparison in compare(run)]
    parts += ["## Ours and published", markdown_table(HEADER, rows)]
    return "\n\n".join([*parts, "\n".join(NOTES)]) + "\n"


def csv_text(runs: Sequence[Run]) -> str:
    """One line per task and run, with unrounded numbers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = (*FIELDS, "limit")
    writer.writerow((*columns, *UNCERTAINTY))
    writer.writerows(
        [*(getattr(row, column) for column in columns), *map(row.interval.get, UNCERTAINTY)]
        for run in runs
        for row in compare(run)
    )
    return buffer.getvalue()
