"""What a benchmark is to `llava eval`: where its questions are, how to ask them, how to score the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from llava.errors import DataError
from llava.eval.run.answers import Row, complete_answers
from llava.eval.run.images import ImageFolder, ImageSource
from llava.eval.run.questions import Question, read_questions, spread


@dataclass(frozen=True)
class RequiredFile:
    """A file or folder that a benchmark needs, where it comes from, and how many rows it should have."""

    path: Path
    source: str
    rows: int | None = None

    @property
    def missing(self) -> bool:
        """Absent, or an empty folder."""
        return not self.path.exists() or (self.path.is_dir() and next(self.path.iterdir(), None) is None)


class Task(ABC):
    """One benchmark, split and data folder. A new one is a subclass and an entry in `llava.eval.tasks.TASKS`."""

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    max_new_tokens: ClassVar[int]
    column: ClassVar[str | None] = None  # its name in the published table (`llava.eval.reporting.published`)

    def __init__(self, data_root: Path | None, split: str) -> None:
        self.data_root = data_root
        self.split = split

    @classmethod
    def default_root(cls, eval_data: Path) -> Path | None:
        """The task's data folder below that of all benchmarks; None where it is elsewhere."""
        return None

    @property
    @abstractmethod
    def image_folder(self) -> Path:
        """What the questions' image names are below."""

    @property
    def pictures(self) -> ImageSource:
        """Where the questions' pictures are."""
        return ImageFolder(self.image_folder)

    @abstractmethod
    def needs(self) -> Sequence[RequiredFile]:
        """Every file and folder of the split."""

    @property
    def published_rows(self) -> int | None:
        """How many questions the split has officially, None when that is not known."""
        return next((need.rows for need in self.needs() if need.rows is not None), None)

    @abstractmethod
    def questions(self, limit: int | None = None) -> Sequence[Question]:
        """The questions of the split in its official order, or `limit` of them spread evenly over it.

        Raises `DataError` when a file is missing, saying which and where it comes from.
        """

    @abstractmethod
    def score(self, answers: Path, limit: int | None = None) -> dict[str, Any]:
        """Scores of a complete answers file; `DataError` when a row is missing or failed (EVAL-4).

        What a server has to score is written beside the answers, and named under `upload`.
        """

    @abstractmethod
    def table(self, score: dict[str, Any]) -> str:
        """The scores as text to print."""

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        """The one number that is published; None where only a server can tell."""
        found = score.get("accuracy")
        return None if found is None else float(found)

    def references(self, rows: Sequence[Row]) -> list[str]:
        """For a report: the right answer to each row's question, empty where it is unknown."""
        return [""] * len(rows)


# --- Benchmarks whose questions are a file of `eval -------------------------------------------------------------------


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

    def needs(self) -> Sequence[RequiredFile]:
        layout = self.layout
        files = [RequiredFile(self.root / name, source) for name, source in layout.labels.items()]
        images = [RequiredFile(self.image_folder, layout.pictures)] if layout.images else []
        return [RequiredFile(self.question_path, layout.source, layout.rows), *files, *images]

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
