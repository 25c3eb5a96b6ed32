"""GQA: 12,578 questions of testdev-balanced about what is where in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.files import read_json, write_json
from llava.eval.scorers import gqa
from llava.eval.tasks.files import FileTask, Layout

LABELS = "data/testdev_balanced_questions.json"
PAGE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"


class Gqa(FileTask):
    name: ClassVar[str] = "gqa"
    column = "GQA"
    folder = "gqa"
    layouts: ClassVar = {
        "testdev_balanced": Layout("llava_gqa_testdev_balanced.jsonl", "data/images", 12578, PAGE, {LABELS: PAGE})
    }
    splits = tuple(layouts)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        answers = {row["question_id"]: row["text"] for row in rows}
        official = [{"questionId": key, "prediction": gqa.prediction(text)} for key, text in answers.items()]
        write_json(path.with_name("testdev_balanced_predictions.json"), official)
        labels = read_json(self.root / LABELS)
        groups = gqa.score({key: labels[key] for key in answers}, answers)
        return {"n": len(rows), "accuracy": groups["all"]["accuracy"], "groups": groups}

    def truths(self, rows: Sequence[Row]) -> list[str]:
        labels = read_json(self.root / LABELS)
        return [str(labels[row["question_id"]]["answer"]) for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return gqa.table(score["groups"])
