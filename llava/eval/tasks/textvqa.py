"""TextVQA: 5,000 questions about text in pictures, with the words a reader found beside most of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.scorers import textvqa
from llava.eval.tasks.files import FileTask, Layout

ANNOTATIONS = "TextVQA_0.5.1_val.json"
PAGE = "https://textvqa.org/dataset/"


class TextVQA(FileTask):
    name: ClassVar[str] = "textvqa"
    column = "TextVQA"
    folder = "textvqa"
    layouts: ClassVar = {
        "val": Layout(
            "llava_textvqa_val_v051_ocr.jsonl", "train_images", 5000, f"{PAGE} (train_val_images.zip)",
            {ANNOTATIONS: PAGE},
        )
    }  # fmt: skip
    splits = tuple(layouts)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        given = {(row["question_id"], textvqa.question_of(row["prompt"])) for row in rows}
        annotations = textvqa.read_annotations(self.root / ANNOTATIONS)
        asked = [item for item in annotations if (item["image_id"], item["question"].lower()) in given]
        return textvqa.score(asked, rows, path)

    def truths(self, rows: Sequence[Row]) -> list[str]:
        people = {
            (item["image_id"], item["question"].lower()): Counter(item["answers"]).most_common(1)[0][0]
            for item in textvqa.read_annotations(self.root / ANNOTATIONS)
        }
        return [people[row["question_id"], textvqa.question_of(row["prompt"])] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return textvqa.table(self.name, score)
