"""Answering a file of prompts: JSON Lines in, JSON Lines out, resumable."""

from __future__ import annotations

from pathlib import Path

from llava.engine import Engine
from llava.errors import DataError
from llava.eval.run.files import Row, read_lines
from llava.eval.run.questions import Question
from llava.eval.run.runner import Outcome, RunSettings, run


def read_prompts(path: Path) -> list[Question]:
    """Rows `{"prompt": …, "image": path or list of paths, "id": …}`; `text` and `images` are accepted names too.

    The id defaults to the row's number, counted from 0. Raises `DataError`, naming the line.
    """
    questions: list[Question] = []
    for number, row in read_lines(path):
        prompt = row.get("prompt", row.get("text"))
        if not isinstance(prompt, str):
            raise DataError(f"{path} line {number} lacks a prompt; it has {', '.join(row) or 'no keys'}.")
        images = row.get("images", row.get("image")) or ()
        images = (images,) if isinstance(images, str) else tuple(images)
        question_id = row.get("id", row.get("question_id"))
        questions.append(Question(len(questions) if question_id is None else question_id, prompt, images))
    return questions


def run_batch(engine: Engine, source: Path, output: Path, settings: RunSettings) -> Outcome:
    """Answer every prompt of `source` into `output`, in order; see `llava.eval.run.runner.run` for resuming."""

    def make_row(question: Question, text: str, error: str | None) -> Row:
        return {
            "question_id": question.question_id,
            "prompt": question.prompt,
            "images": list(question.images),
            "text": text,
            "model_id": settings.model_id,
            "metadata": {} if error is None else {"error": error},
        }

    return run(engine, read_prompts(source), output, settings, make_row)
