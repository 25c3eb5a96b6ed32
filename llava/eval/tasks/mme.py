"""MME: 2,374 yes/no questions, two a picture, of ten tasks of perception and four of cognition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import ConfigError
from llava.eval.answers import Row
from llava.eval.questions import Question
from llava.eval.scorers import mme
from llava.eval.tasks.files import FileTask, Layout

PAGE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation, on request"


class Mme(FileTask):
    name: ClassVar[str] = "mme"
    column = "MME"
    folder = "MME"
    layouts: ClassVar = {"test": Layout("llava_mme.jsonl", "MME_Benchmark_release_version", 2374, PAGE)}
    splits = tuple(layouts)

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        if limit is not None:
            raise ConfigError("MME is scored by pairs of questions, so it takes no --limit.")
        return super().questions()

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        return mme.score(mme.convert(self.image_folder, path))

    def headline(self, score: dict[str, Any]) -> float | None:
        return float(score["Perception"])

    def truths(self, rows: Sequence[Row]) -> list[str]:
        truth = mme.read_truth(self.image_folder)
        return [truth[mme.answer_key(row["question_id"], row["prompt"])][1] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return mme.table(score)
