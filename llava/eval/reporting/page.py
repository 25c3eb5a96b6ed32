"""HTML page of a report: the tables, the chart, and sample answers with their images, in one file."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llava.errors import LlavaError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.parsing import normalize
from llava.eval.benchmarks.registry import make_task
from llava.eval.reporting.data import HEADER, NOTES, Run, compare, model_zoo
from llava.eval.reporting.errors import Analysis
from llava.eval.reporting.rendering import data_url, render
from llava.eval.run.files import Record, Row, read_rows
from llava.eval.run.questions import QuestionId, subsample

logger = logging.getLogger(__name__)

THUMBNAIL: Final = 320  # pixels of the longer side
# a task, the error analysis of each run by name, and the reason for each run that has none
TaskErrors = tuple[str, Mapping[str, Analysis], Mapping[str, str]]


@dataclass(frozen=True)
class Sample:
    """A question with the answers of each run, the reference, and the image as a data URL (empty if unavailable)."""

    question_id: QuestionId
    prompt: str
    answers: Mapping[str, str]
    reference: str = ""
    image: str = ""

    def is_correct(self, answer: str) -> bool | None:
        """Whether an answer equals the reference; None if the reference is unknown or a long text."""
        if not self.reference or len(self.reference) > 40:
            return None
        return normalize(answer) == normalize(self.reference)


def collect_samples(runs: Sequence[Run], task_name: str, count: int) -> list[Sample]:
    """`count` evenly spaced questions of a benchmark with the answers of every run.

    Without the benchmark's data, samples have no image and no reference.
    """
    run = next(run for run in runs if task_name in run.scores)
    rows = list(subsample(_read_answers(run, task_name), count))
    texts = {other.name: {_key(row): str(row["text"]) for row in _read_answers(other, task_name)} for other in runs}
    references, images = _references_and_images(run.scores[task_name], rows)
    return [
        Sample(
            row["question_id"], str(row["prompt"]).removeprefix("<image>\n"),
            {name: found[_key(row)] for name, found in texts.items() if _key(row) in found}, reference, image,
        )
        for row, reference, image in zip(rows, references, images)
    ]  # fmt: skip


def _read_answers(run: Run, task_name: str) -> list[Row]:
    path = run.folder / task_name / "answers.jsonl"
    return read_rows(path, "question_id", "prompt", "text") if path.is_file() else []


def _key(row: Record) -> tuple[QuestionId, str]:
    return row["question_id"], row["prompt"]


def _references_and_images(score: Record, rows: Sequence[Record]) -> tuple[list[str], list[str]]:
    """References and thumbnails of the answers, empty strings if the data cannot be read."""
    root = score.get("data_root")
    try:
        task = make_task(str(score["task"]), None if root is None else Path(root), score.get("split"))
        questions = {(each.question_id, each.prompt): each for each in task.questions(score.get("limit"))}
        references = task.references(rows)
    except (LlavaError, KeyError) as error:
        logger.warning("No images for %s: %s", score.get("task"), error)
        return [""] * len(rows), [""] * len(rows)
    names = [question.images if (question := questions.get(_key(row))) else () for row in rows]
    return references, [thumbnail(task, each[0]) if each else "" for each in names]


def thumbnail(task: Task, name: str) -> str:
    """A small JPEG of an image as a data URL, empty if it cannot be read."""
    try:
        image = task.images.open(name)
    except LlavaError as error:
        logger.warning("%s", error)
        return ""
    return data_url(image, THUMBNAIL, quality=85)


def render_page(
    runs: Sequence[Run], chart: bytes | None, samples: Mapping[str, Sequence[Sample]], errors: Sequence[TaskErrors] = ()
) -> str:
    """The page with the samples and the error analysis of each task."""
    return render(
        "report.html",
        names=", ".join(run.name for run in runs),
        zoo=model_zoo(runs) if any(run.by_column for run in runs) else None,
        chart=None if chart is None else base64.b64encode(chart).decode(),
        notes=NOTES,
        header=HEADER,
        compared=[row.cells() for run in runs for row in compare(run)],
        samples=samples,
        errors=errors,
    )
