"""POPE: 8,910 yes/no questions about objects that are, or are not, in COCO pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.files import read_rows
from llava.eval.scorers import pope
from llava.eval.tasks.files import COCO, FileTask, Layout

LABELS = "https://github.com/AoiDragon/POPE, output/coco (the random file has 2,910 lines; docs/Evaluation.md)"


class Pope(FileTask):
    name: ClassVar[str] = "pope"
    column = "POPE"
    folder = "pope"
    layouts: ClassVar = {
        "test": Layout(
            "llava_pope_test.jsonl", "val2014", 8910, f"{COCO}val2014.zip",
            {f"coco/coco_pope_{kind}.json": LABELS for kind in ("adversarial", "popular", "random")},
        )
    }  # fmt: skip
    splits = tuple(layouts)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        asked = self._asked()
        answers = {row["question_id"]: row["text"] for row in rows}
        return pope.score_answers(pope.read_labels(self.root / "coco"), [asked[key] for key in answers], answers)

    def headline(self, score: dict[str, Any]) -> float | None:
        return float(score["mean_f1"])

    def truths(self, rows: Sequence[Row]) -> list[str]:
        labels, asked = pope.read_labels(self.root / "coco"), self._asked()
        questions = [asked[row["question_id"]] for row in rows]
        return [labels[each["category"]][pope.label_key(each)] for each in questions]

    def _asked(self) -> dict[Any, Row]:
        return {row["question_id"]: row for row in read_rows(self.question_path, *pope.QUESTION_KEYS)}

    def table(self, score: dict[str, Any]) -> str:
        return pope.table(score)
