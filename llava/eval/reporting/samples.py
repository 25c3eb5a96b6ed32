"""Sample answers of a run, with their pictures, for people to look at."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llava.errors import LlavaError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.parsing import normalize
from llava.eval.benchmarks.registry import make_task
from llava.eval.reporting.data import Run
from llava.eval.run.answers import Row
from llava.eval.run.files import read_rows
from llava.eval.run.questions import Question, spread

logger = logging.getLogger(__name__)

SIDE: Final = 320  # pixels of a thumbnail's longer side


@dataclass(frozen=True)
class Sample:
    """A question, its answers by run, what is true, and the picture as a data URL (empty when it is not here)."""

    question_id: Any
    prompt: str
    answers: Mapping[str, str]
    truth: str = ""
    picture: str = ""

    def agrees(self, answer: str) -> bool | None:
        """Whether an answer is the truth word for word; None when the truth is unknown, or a long text."""
        if not self.truth or len(self.truth) > 40:
            return None
        return normalize(answer) == normalize(self.truth)


def samples(runs: Sequence[Run], task_name: str, count: int) -> list[Sample]:
    """`count` questions spread over a benchmark, as all runs that asked it answered them.

    Pictures and references need the benchmark's data where they were; without it there are only words.
    """
    run = next(run for run in runs if task_name in run.scores)
    rows = list(spread(_rows(run, task_name), count))
    texts = {other.name: {_key(row): str(row["text"]) for row in _rows(other, task_name)} for other in runs}
    references, pictures = _from_data(run.scores[task_name], rows)
    return [
        Sample(
            row["question_id"], str(row["prompt"]).removeprefix("<image>\n"),
            {name: found[_key(row)] for name, found in texts.items() if _key(row) in found}, truth, picture,
        )
        for row, truth, picture in zip(rows, references, pictures)
    ]  # fmt: skip


def _rows(run: Run, task_name: str) -> list[Row]:
    path = run.folder / task_name / "answers.jsonl"
    return read_rows(path, "question_id", "prompt", "text") if path.is_file() else []


def _key(row: Row) -> tuple[Any, str]:
    return row["question_id"], row["prompt"]


def _from_data(score: Mapping[str, Any], rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Truths and pictures of the rows, empty texts where the data cannot be read."""
    root = score.get("data_root")
    try:
        task = make_task(str(score["task"]), None if root is None else Path(root), score.get("split"))
        questions = {(each.question_id, each.prompt): each for each in task.questions(score.get("limit"))}
        references = task.references(rows)
    except (LlavaError, KeyError) as error:
        logger.warning("No pictures for %s: %s", score.get("task"), error)
        return [""] * len(rows), [""] * len(rows)
    return references, [_thumbnail(task, questions.get(_key(row))) for row in rows]


def _thumbnail(task: Task, question: Question | None) -> str:
    if question is None or not question.images:
        return ""
    try:
        image = task.pictures.open(question.images[0])
    except LlavaError as error:
        logger.warning("%s", error)
        return ""
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
