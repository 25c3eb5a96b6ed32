"""SEED-Bench: 19,242 multiple-choice questions about pictures and frames of videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.files import write_jsonl
from llava.eval.scorers import seed
from llava.eval.tasks.base import Need
from llava.eval.tasks.files import FileTask, Layout

PAGE = "https://github.com/AILab-CVC/SEED-Bench"


class SeedBench(FileTask):
    """Pictures are in two folders beside the question file, frames of videos in the second."""

    name: ClassVar[str] = "seed"
    column = "SEED"
    folder = "seed_bench"
    layouts: ClassVar = {"test": Layout("llava-seed-bench.jsonl", ".", 19242, PAGE, {"SEED-Bench.json": PAGE})}
    splits = ("test",)

    def needs(self) -> Sequence[Need]:
        folders = {"SEED-Bench-image": PAGE, "SEED-Bench-video-image": f"{PAGE}: the middle frames of its videos"}
        return [*super().needs()[:-1], *(Need(self.root / name, source) for name, source in folders.items())]

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        annotation = seed.read_annotation(self.root / "SEED-Bench.json")
        answers = {seed.plain_id(row["question_id"]): row["text"] for row in rows}
        asked = [each for each in annotation["questions"] if seed.plain_id(each["question_id"]) in answers]
        target = path.with_name("upload.jsonl")
        write_jsonl(target, seed.upload(asked, answers))
        return {**seed.score({**annotation, "questions": asked}, answers), "upload": str(target)}

    def headline(self, score: dict[str, Any]) -> float | None:
        return float(score["total"])

    def truths(self, rows: Sequence[Row]) -> list[str]:
        questions = seed.read_annotation(self.root / "SEED-Bench.json")["questions"]
        answers = {seed.plain_id(each["question_id"]): str(each["answer"]) for each in questions}
        return [answers[seed.plain_id(row["question_id"])] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return seed.table(score)
