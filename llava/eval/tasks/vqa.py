"""VQAv2 and VizWiz: short answers, scored by their servers; on the validation splits here, as there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.files import read_json
from llava.eval.questions import SHORT_SUFFIX, Question
from llava.eval.scorers import vqa
from llava.eval.tasks.files import COCO, EVAL_ZIP, FileTask, Layout

VQA = "https://visualqa.org/download.html"
VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa/"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class SoftAccuracyTask(FileTask):
    """Labels are public where the layout's first label file is people's answers; elsewhere an upload is written."""

    labelled: ClassVar[str] = "val"
    server: ClassVar[str]

    @property
    def people(self) -> Path:
        return self.root / next(iter(self.layout.labels), self.layout.questions)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        if self.split != self.labelled:
            target = path.with_name("upload.json")
            self.submit(path, target)
            return {"n": len(rows), "upload": str(target), "server": self.server}
        answers = {row["question_id"]: row["text"] for row in rows}
        return vqa.score({key: given for key, given in vqa.read_people(self.people).items() if key in answers}, answers)

    def submit(self, path: Path, target: Path) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define submit()")  # pragma: no cover

    def truths(self, rows: Sequence[Row]) -> list[str]:
        if self.split != self.labelled:
            return super().truths(rows)
        people = vqa.read_people(self.people)
        return [Counter(people[row["question_id"]]).most_common(1)[0][0] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        if "upload" in score:
            return f"Answers: {score['n']}\nNot scored here: submit {score['upload']} to {score['server']}."
        return f"Samples: {score['n']}\nAccuracy: {score['accuracy']:.2f}%"


class VQAv2(SoftAccuracyTask):
    name: ClassVar[str] = "vqav2"
    column = "VQAv2"
    folder = "vqav2"
    server = "EvalAI, challenge 830"
    layouts: ClassVar = {
        "test-dev": Layout(
            "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015", 107394, f"{COCO}test2015.zip",
            {vqa.JOIN_LIST: EVAL_ZIP},
        ),
        "val": Layout(
            "v2_OpenEnded_mscoco_val2014_questions.json", "val2014", 214354, f"{COCO}val2014.zip",
            {"v2_mscoco_val2014_annotations.json": VQA}, VQA,
        ),
    }  # fmt: skip
    splits = tuple(layouts)

    def read(self, path: Path) -> Sequence[Question]:
        if self.split != self.labelled:
            return super().read(path)
        return [
            Question(row["question_id"], f"{row['question']}\n{SHORT_SUFFIX}",
                     (f"COCO_val2014_{row['image_id']:012d}.jpg",))
            for row in read_json(path)["questions"]
        ]  # fmt: skip

    def submit(self, path: Path, target: Path) -> None:
        vqa.write_vqav2(self.root / vqa.JOIN_LIST, path, target)


class VizWiz(SoftAccuracyTask):
    name: ClassVar[str] = "vizwiz"
    column = "VizWiz"
    folder = "vizwiz"
    server = "EvalAI, challenge 2185"
    layouts: ClassVar = {
        "test": Layout("llava_test.jsonl", "test", 8000, VIZWIZ),
        "val": Layout("val.json", "val", 4319, VIZWIZ, source=VIZWIZ),
    }
    splits = tuple(layouts)

    def read(self, path: Path) -> Sequence[Question]:
        if self.split != self.labelled:
            return super().read(path)
        return [
            Question(number, f"{row['question']}\n{UNANSWERABLE}\n{SHORT_SUFFIX}", (row["image"],))
            for number, row in enumerate(read_json(path))
        ]

    def submit(self, path: Path, target: Path) -> None:
        vqa.write_vizwiz(self.question_path, path, target, partly=True)
