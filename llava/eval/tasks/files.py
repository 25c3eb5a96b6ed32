"""Benchmarks whose questions are a file of `eval.zip` and whose labels are official downloads (spec/eval.md §8)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.answers import Row, complete_answers
from llava.eval.questions import Question, read_questions, spread
from llava.eval.tasks.base import Task

DATA = Path("playground/data/eval")


class FileTask(Task):
    """`data_root` (default: `playground/data/eval/FOLDER`) holds the files below, which `sources` says how to get."""

    splits: ClassVar[tuple[str, ...]] = ("test",)
    max_new_tokens: ClassVar[int] = 128
    folder: ClassVar[str]
    question_file: ClassVar[str]
    images: ClassVar[str]
    sources: ClassVar[Mapping[str, str]]

    @property
    def root(self) -> Path:
        return self.data_root if self.data_root is not None else DATA / self.folder

    @property
    def image_folder(self) -> Path:
        return self.root / self.images

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        for name, source in {self.question_file: "eval.zip (docs/Evaluation.md)", **self.sources}.items():
            if not (self.root / name).exists():
                raise DataError(f"{self.name} needs {self.root / name}, which is missing; it comes from {source}.")
        return spread(self.read(self.root / self.question_file), limit)

    def read(self, path: Path) -> Sequence[Question]:
        """All questions of the file."""
        return read_questions(path)

    def score(self, answers: Path, limit: int | None = None) -> dict[str, Any]:
        rows = complete_answers(answers, self.questions(limit))
        return {"task": self.name, "split": self.split, **self.score_rows(rows, answers)}

    @abstractmethod
    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        """Scores of complete answers, which `path` holds; of those questions only, if they are a part of the file."""
