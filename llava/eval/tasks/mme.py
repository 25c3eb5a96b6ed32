"""MME: 2,374 yes/no questions, two a picture, of ten tasks of perception and four of cognition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import ConfigError
from llava.eval.answers import Row
from llava.eval.questions import Question
from llava.eval.scorers import mme
from llava.eval.tasks.files import FileTask


class Mme(FileTask):
    name: ClassVar[str] = "mme"
    folder = "MME"
    question_file = "llava_mme.jsonl"
    images = "MME_Benchmark_release_version"
    sources: ClassVar = {"MME_Benchmark_release_version": "MME's repository, on request to its authors"}

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        if limit is not None:
            raise ConfigError("MME is scored by pairs of questions, so it takes no --limit.")
        return super().questions()

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        return mme.score(mme.convert(self.image_folder, path))

    def table(self, score: dict[str, Any]) -> str:
        return mme.table(score)
