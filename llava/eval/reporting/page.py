"""HTML page of a report: the tables, the chart, and sample answers with their images, in one file."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Final

from llava.errors import LlavaError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.parsing import normalize
from llava.eval.benchmarks.registry import make_task
from llava.eval.reporting.data import HEADER, INSIDE, NOTES, OUTSIDE, Run, compare, model_zoo
from llava.eval.run.files import Record, Row, read_rows
from llava.eval.run.questions import QuestionId, subsample

logger = logging.getLogger(__name__)

THUMBNAIL: Final = 320  # pixels of the longer side
TEXT_COLUMNS: Final = {"", "model", "tower", "LLM", "run", "task", "split", "verdict", "setting", "first", "second"}


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
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def document(title: str, parts: Sequence[str]) -> str:
    """A self-contained page; the texts in `parts` must be escaped."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def render_page(
    runs: Sequence[Run], chart: bytes | None, samples: Mapping[str, Sequence[Sample]], panels: Sequence[str] = ()
) -> str:
    """The page with the samples of each task and the panels of the error analysis."""
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>Evaluation</h1><p>{escape(names)}</p>"]
    header, rows = model_zoo(runs)
    if any(run.by_column for run in runs):
        parts.append(table(header, rows, [row[0] for row in rows]))
    if chart is not None:
        encoded = base64.b64encode(chart).decode()
        image = f'<img class="chart" alt="Scores" src="data:image/png;base64,{encoded}">'
        parts.append(f'<h2>Scores</h2><div class="wide">{image}</div>')
    compared = [row.cells() for run in runs for row in compare(run)]
    parts.append("<h2>Ours and published</h2>" + "".join(f"<p>{escape(note.replace('`', ''))}</p>" for note in NOTES))
    parts.append(table(HEADER, compared))
    parts += panels
    for task, shown in samples.items():
        cards = "".join(map(_card, shown))
        parts.append(f'<h2>Answers: {escape(task)}</h2><div class="cards">{cards}</div>')
    return document(f"Evaluation: {names}", parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table; `classes` are those of its rows."""

    def cell(tag: str, column: str, text: str) -> str:
        attribute = "" if column in TEXT_COLUMNS else ' class="number"'
        if text in (INSIDE, OUTSIDE):
            attribute = f' class="{text}"'
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, column) for column in header)
    body = "".join(
        f'<tr class="{escape(name)}">' + "".join(map(cell, ["td"] * len(row), header, row)) + "</tr>"
        for name, row in zip_longest(classes[: len(rows)], rows, fillvalue="")
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _card(sample: Sample) -> str:
    frame = f'<img alt="" src="{escape(sample.image)}">' if sample.image else "no image"
    pairs = []
    for run, answer in sample.answers.items():
        correct = sample.is_correct(answer)
        attribute = "" if correct is None else ' class="same"' if correct else ' class="differs"'
        pairs.append(f"<dt>{escape(run)}</dt><dd{attribute}>{escape(answer) or '(empty)'}</dd>")
    if sample.reference:
        pairs.append(f"<dt>reference</dt><dd>{escape(sample.reference)}</dd>")
    return (
        f'<div class="card"><div class="frame">{frame}</div>'
        f'<div class="words"><pre>{escape(sample.prompt)}</pre><dl>{"".join(pairs)}</dl></div></div>'
    )
