"""What a benchmark is to `llava eval`: where its questions are, how to ask them, how to score the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.pictures import Folder, PictureSource
from llava.eval.questions import Question


@dataclass(frozen=True)
class Need:
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
    column: ClassVar[str | None] = None  # its name in the published table (`llava.eval.published`)

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
    def pictures(self) -> PictureSource:
        """Where the questions' pictures are."""
        return Folder(self.image_folder)

    @abstractmethod
    def needs(self) -> Sequence[Need]:
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

    def headline(self, score: dict[str, Any]) -> float | None:
        """The one number that is published; None where only a server can tell."""
        found = score.get("accuracy")
        return None if found is None else float(found)

    def truths(self, rows: Sequence[Row]) -> list[str]:
        """For a report: the right answer to each row's question, empty where it is unknown."""
        return [""] * len(rows)
