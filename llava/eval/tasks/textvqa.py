"""TextVQA: 5,000 questions about text in pictures, with the words a reader found beside most of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.scorers import textvqa
from llava.eval.tasks.files import FileTask

ANNOTATIONS = "TextVQA_0.5.1_val.json"


class TextVQA(FileTask):
    name: ClassVar[str] = "textvqa"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    folder = "textvqa"
    question_file = "llava_textvqa_val_v051_ocr.jsonl"
    images = "train_images"
    sources: ClassVar = {ANNOTATIONS: "textvqa.org", "train_images": "textvqa.org (train_val_images.zip)"}

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        given = {(row["question_id"], textvqa.question_of(row["prompt"])) for row in rows}
        annotations = textvqa.read_annotations(self.root / ANNOTATIONS)
        asked = [item for item in annotations if (item["image_id"], item["question"].lower()) in given]
        return textvqa.score(asked, rows, path)

    def table(self, score: dict[str, Any]) -> str:
        return textvqa.table(self.name, score)
