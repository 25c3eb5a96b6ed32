"""VQAv2 and VizWiz: submissions to their servers, and the same soft accuracy where labels are public (§4.1, §6)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import COCO, EVAL_ZIP, FileTask, Layout
from llava.eval.benchmarks.parsing import normalize, soft_accuracy
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_json, read_results, read_rows, require_same, write_json
from llava.eval.run.questions import SHORT_SUFFIX, Question

logger = logging.getLogger(__name__)

JOIN_LIST = "llava_vqav2_mscoco_test2015.jsonl"


def _texts(path: Path) -> dict[Any, str]:
    return {key: row["text"] for key, row in by_key(read_results(path), path, "question_id").items()}


def submit_vqav2(dir: Path, ckpt: str, split: str) -> str:
    """Write `answers_upload/SPLIT/CKPT.json`: normalised answers for all of test2015, empty where SPLIT has none."""
    target = dir / "answers_upload" / split / f"{ckpt}.json"
    write_vqav2(dir / JOIN_LIST, dir / "answers" / split / ckpt / "merge.jsonl", target)
    return f"{target}"


def write_vqav2(join_list: Path, source: Path, target: Path) -> None:
    """`DataError`, and no file, when an answer is to none of the questions of the list."""
    answers = _texts(source)
    asked = [row["question_id"] for row in read_rows(join_list, "question_id")]
    strange = answers.keys() - set(asked)
    if strange:
        raise DataError(
            f"{source} answers {len(strange)} question(s) that {join_list.name} does not have; nothing written."
        )
    write_json(target, [{"question_id": each, "answer": normalize(answers.get(each, ""))} for each in asked])
    logger.warning("%d of %d questions have an answer, the others an empty one.", len(answers), len(asked))


def submit_vizwiz(annotation_file: Path, result_file: Path, result_upload_file: Path) -> str:
    """Write `[{"image", "answer"}]`; `DataError`, and no file, unless every question has its answer."""
    write_vizwiz(annotation_file, result_file, result_upload_file)
    return f"{result_upload_file}"


def write_vizwiz(questions_file: Path, source: Path, target: Path, *, partly: bool = False) -> None:
    """The upload; with `partly`, of the questions that are answered."""
    answers = _texts(source)
    questions = read_rows(questions_file, "question_id", "image")
    if partly:
        questions = [row for row in questions if row["question_id"] in answers]
    require_same(answers, [row["question_id"] for row in questions], source)
    upload = [{"image": row["image"], "answer": normalize(answers[row["question_id"]])} for row in questions]
    write_json(target, upload)


def score(people: Mapping[Any, Sequence[str]], answers: Mapping[Any, str]) -> dict[str, Any]:
    """Mean soft accuracy in percent of answers by id, against the answers of people by the same ids."""
    total = sum(soft_accuracy(answers[key], given) for key, given in people.items())
    return {"n": len(people), "accuracy": 100 * total / len(people)}


def read_people(path: Path) -> dict[Any, list[str]]:
    """People's answers: VQAv2's by `question_id`, VizWiz's by running number, as its question file counts them."""
    content = read_json(path)
    rows = content["annotations"] if isinstance(content, dict) and "annotations" in content else content
    if not isinstance(rows, list) or not rows or not all("answers" in row for row in rows):
        raise DataError(f"{path} has no 'answers'; expected the annotations of a split whose labels are public (val).")
    return {row.get("question_id", n): [each["answer"] for each in row["answers"]] for n, row in enumerate(rows)}


def evaluate(annotation_file: Path, result_file: Path) -> str:
    """Score an answers file of a labelled split; `DataError` unless it answers exactly its questions."""
    people, answers = read_people(annotation_file), _texts(result_file)
    require_same(answers, people, result_file)
    result = score(people, answers)
    return f"Samples: {result['n']}\nAccuracy: {result['accuracy']:.2f}%"


# --- VQAv2 and VizWiz -------------------------------------------------------------------------------------------------


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
        return score({key: given for key, given in read_people(self.people).items() if key in answers}, answers)

    def submit(self, path: Path, target: Path) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define submit()")  # pragma: no cover

    def references(self, rows: Sequence[Row]) -> list[str]:
        if self.split != self.labelled:
            return super().references(rows)
        people = read_people(self.people)
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
            {JOIN_LIST: EVAL_ZIP},
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
        write_vqav2(self.root / JOIN_LIST, path, target)


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
        write_vizwiz(self.question_path, path, target, partly=True)
