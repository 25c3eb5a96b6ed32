"""What a benchmark is to `llava eval`: where its questions are, how to ask them, how to score the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.questions import Question


class Task(ABC):
    """One benchmark, split and data folder. A new one is a subclass and an entry in `llava.eval.tasks.TASKS`."""

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    max_new_tokens: ClassVar[int]

    def __init__(self, data_root: Path | None, split: str) -> None:
        self.data_root = data_root
        self.split = split

    @property
    @abstractmethod
    def image_folder(self) -> Path:
        """What the questions' image names are below."""

    @abstractmethod
    def questions(self, limit: int | None = None) -> Sequence[Question]:
        """The questions of the split in its official order, or `limit` of them spread evenly over it.

        Raises `DataError` when a file is missing, saying which and where it comes from.
        """

    @abstractmethod
    def score(self, answers: Path, limit: int | None = None) -> dict[str, Any]:
        """Scores of a complete answers file; `DataError` when a row is missing or failed (EVAL-4)."""

    @abstractmethod
    def table(self, score: dict[str, Any]) -> str:
        """The scores as text to print."""
