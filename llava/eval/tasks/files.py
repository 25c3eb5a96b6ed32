"""Benchmarks whose questions are a file of `eval.zip` and whose labels are official downloads (spec/eval.md §8)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from llava.errors import DataError
from llava.eval.answers import Row, complete_answers
from llava.eval.questions import Question, read_questions, spread
from llava.eval.tasks.base import Need, Task

DATA: Final = Path("playground/data/eval")
EVAL_ZIP: Final = "eval.zip, linked by https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"
COCO: Final = "http://images.cocodataset.org/zips/"


@dataclass(frozen=True)
class Layout:
    """Files of one split below the benchmark's folder: questions (`rows` of them), pictures, and `labels`.

    `labels` says for each other file where it comes from; so do `source` and `pictures` for the first two.
    """

    questions: str
    images: str
    rows: int
    pictures: str
    labels: Mapping[str, str] = field(default_factory=dict)
    source: str = EVAL_ZIP


class FileTask(Task):
    """`data_root` (default: `playground/data/eval/FOLDER`) holds the files of the split's layout."""

    max_new_tokens: ClassVar[int] = 128
    folder: ClassVar[str]
    layouts: ClassVar[Mapping[str, Layout]]

    @classmethod
    def default_root(cls, eval_data: Path) -> Path:
        return eval_data / cls.folder

    @property
    def layout(self) -> Layout:
        return self.layouts[self.split]

    @property
    def root(self) -> Path:
        return self.data_root if self.data_root is not None else self.default_root(DATA)

    @property
    def question_path(self) -> Path:
        return self.root / self.layout.questions

    @property
    def image_folder(self) -> Path:
        return self.root / self.layout.images

    def needs(self) -> Sequence[Need]:
        layout = self.layout
        files = [Need(self.root / name, source) for name, source in layout.labels.items()]
        images = [Need(self.image_folder, layout.pictures)] if layout.images else []
        return [Need(self.question_path, layout.source, layout.rows), *files, *images]

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        for need in self.needs():
            if need.missing:
                raise DataError(
                    f"{self.name} needs {need.path}, which is missing; it comes from {need.source}. "
                    f"See all it needs: llava eval prepare {self.name}"
                )
        return spread(self.read(self.question_path), limit)

    def read(self, path: Path) -> Sequence[Question]:
        """All questions of the file."""
        return read_questions(path)

    def score(self, answers: Path, limit: int | None = None) -> dict[str, Any]:
        rows = complete_answers(answers, self.questions(limit))
        return {"task": self.name, "split": self.split, **self.score_rows(rows, answers)}

    @abstractmethod
    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        """Scores of complete answers, which `path` holds; of those questions only, if they are a part of the file."""
