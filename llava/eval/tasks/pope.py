"""POPE: 8,910 yes/no questions about objects that are, or are not, in COCO pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.files import read_rows
from llava.eval.scorers import pope
from llava.eval.tasks.files import FileTask


class Pope(FileTask):
    name: ClassVar[str] = "pope"
    folder = "pope"
    question_file = "llava_pope_test.jsonl"
    images = "val2014"
    sources: ClassVar = {"coco": "POPE's repository (output/coco)", "val2014": "COCO (zips/val2014.zip)"}

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        asked = {row["question_id"]: row for row in read_rows(self.root / self.question_file, *pope.QUESTION_KEYS)}
        answers = {row["question_id"]: row["text"] for row in rows}
        return pope.score_answers(pope.read_labels(self.root / "coco"), [asked[key] for key in answers], answers)

    def table(self, score: dict[str, Any]) -> str:
        return pope.table(score)
