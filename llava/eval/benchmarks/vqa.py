"""VQAv2 and VizWiz: uploads for their servers, and soft accuracy on splits with public labels."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import COCO, EVAL_ZIP, Layout, Scores, Task, count_unread, is_blank
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.benchmarks.parsing import normalize, official_soft_accuracy, soft_accuracy
from llava.eval.run.answers import read_texts
from llava.eval.run.files import Record, Row, read_json, read_rows, require_labels, require_same, write_json
from llava.eval.run.questions import SHORT_SUFFIX, Question, QuestionId

logger = logging.getLogger(__name__)

VQAV2_PAGE = "https://visualqa.org/download.html"
VIZWIZ_PAGE = "https://vizwiz.org/tasks-and-datasets/vqa/"
JOIN_LIST = "llava_vqav2_mscoco_test2015.jsonl"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read_human_answers(path: Path) -> dict[QuestionId, list[str]]:
    """Human answers by `question_id` (VQAv2), or by running number as in the question file (VizWiz)."""
    content = read_json(path)
    rows = content["annotations"] if isinstance(content, dict) and "annotations" in content else content
    if not isinstance(rows, list) or not rows or not all("answers" in row for row in rows):
        raise DataError(f"{path} has no 'answers'; expected the annotations of a split with public labels (val).")
    return {row.get("question_id", n): [each["answer"] for each in row["answers"]] for n, row in enumerate(rows)}


def score_answers(human_answers: Mapping[QuestionId, Sequence[str]], answers: Mapping[QuestionId, str]) -> Scores:
    """Mean soft accuracy in percent over the questions of `human_answers`, and outcomes.

    `accuracy` is that of the challenge's program for the normalized answers, which are what the converters submit;
    `as_written` is its accuracy for the answers themselves. Where all people agree, the program compares literally;
    `normalized` compares normalized answers there too.
    """

    def each(rule: Callable[[str, Sequence[str]], float], prepare: Callable[[str], str] = str) -> list[float]:
        return [rule(prepare(answers[key]), people) for key, people in human_answers.items()]

    found = {
        "accuracy": each(official_soft_accuracy, normalize),
        "as_written": each(official_soft_accuracy),
        "normalized": each(soft_accuracy),
    }
    rows = zip(human_answers, *found.values())
    outcomes = [Outcome(str(key), a, (), {"as_written": b, "normalized": c}) for key, a, b, c in rows]
    means = {name: 100 * sum(values) / len(answers) for name, values in found.items()}
    return {"n": len(answers), **means, **count_unread(map(is_blank, answers.values())), "outcomes": outcomes}


def write_vqav2(join_list: Path, source: Path, target: Path) -> None:
    """Write normalized answers to all questions of `join_list`, empty where `source` has none.

    Raises `DataError`, and writes nothing, if `source` answers other questions.
    """
    answers = read_texts(source)
    asked = [row["question_id"] for row in read_rows(join_list, "question_id")]
    unknown = answers.keys() - set(asked)
    if unknown:
        raise DataError(
            f"{source} answers {len(unknown)} question(s) that are not in {join_list.name}; nothing written."
        )
    write_json(target, [{"question_id": each, "answer": normalize(answers.get(each, ""))} for each in asked])
    logger.warning("%d of %d questions have an answer; the others are submitted empty.", len(answers), len(asked))


def write_vizwiz(questions_file: Path, source: Path, target: Path, *, subset: bool = False) -> None:
    """Write `[{"image", "answer"}]`; with `subset`, of the answered questions only.

    Raises `DataError`, and writes nothing, unless every question has an answer.
    """
    answers = read_texts(source)
    questions = read_rows(questions_file, "question_id", "image")
    if subset:
        questions = [row for row in questions if row["question_id"] in answers]
    require_same(answers, [row["question_id"] for row in questions], source)
    upload = [{"image": row["image"], "answer": normalize(answers[row["question_id"]])} for row in questions]
    write_json(target, upload)


class SoftAccuracyTask(Task):
    """A benchmark with public labels on `val`; the answers to other splits are written for its server."""

    server: ClassVar[str]

    @property
    def has_labels(self) -> bool:
        return self.split == "val"

    def human_answers(self) -> dict[QuestionId, list[str]]:
        return read_human_answers(self.root / next(iter(self.layout.labels), self.layout.questions))

    @abstractmethod
    def write_upload(self, answers: Path, target: Path) -> None:
        """Write the file for the server."""

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        if not self.has_labels:
            target = path.with_name("upload.json")
            self.write_upload(path, target)
            return {"n": len(rows), "upload": str(target), "server": self.server}
        answers, people = {row["question_id"]: row["text"] for row in rows}, self.human_answers()
        require_labels(answers, people, self.root)
        return score_answers({key: people[key] for key in answers}, answers)

    def references(self, rows: Sequence[Record]) -> list[str]:
        if not self.has_labels:
            return super().references(rows)
        human_answers = self.human_answers()
        return [Counter(human_answers[row["question_id"]]).most_common(1)[0][0] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        if "upload" in scores:
            return f"Answers: {scores['n']}\nNot scored here: submit {scores['upload']} to {scores['server']}."
        lines = [f"Samples: {scores['n']}", f"Accuracy: {scores['accuracy']:.2f}%"]
        others = {
            "as_written": "by the same program for the answers as written",
            "normalized": "with all human answers normalized",
        }
        lines += [
            f"  {scores[key]:.2f} % {label}" for key, label in others.items() if scores[key] != scores["accuracy"]
        ]
        return "\n".join(lines)


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
            {"v2_mscoco_val2014_annotations.json": VQAV2_PAGE}, VQAV2_PAGE,
        ),
    }  # fmt: skip

    def read_questions(self, path: Path) -> Sequence[Question]:
        if not self.has_labels:
            return super().read_questions(path)
        return [
            Question(row["question_id"], f"{row['question']}\n{SHORT_SUFFIX}",
                     (f"COCO_val2014_{row['image_id']:012d}.jpg",))
            for row in read_json(path)["questions"]
        ]  # fmt: skip

    def write_upload(self, answers: Path, target: Path) -> None:
        write_vqav2(self.root / JOIN_LIST, answers, target)


class VizWiz(SoftAccuracyTask):
    name: ClassVar[str] = "vizwiz"
    column = "VizWiz"
    folder = "vizwiz"
    server = "EvalAI, challenge 2185"
    layouts: ClassVar = {
        "test": Layout("llava_test.jsonl", "test", 8000, VIZWIZ_PAGE),
        "val": Layout("val.json", "val", 4319, VIZWIZ_PAGE, source=VIZWIZ_PAGE),
    }

    def read_questions(self, path: Path) -> Sequence[Question]:
        if not self.has_labels:
            return super().read_questions(path)
        return [
            Question(number, f"{row['question']}\n{UNANSWERABLE}\n{SHORT_SUFFIX}", (row["image"],))
            for number, row in enumerate(read_json(path))
        ]

    def write_upload(self, answers: Path, target: Path) -> None:
        write_vizwiz(self.question_path, answers, target, subset=True)


def evaluate(annotation_file: Path, result_file: Path) -> str:
    """`eval_vqa`: score answers to a labelled split. Raises `DataError` unless they match its questions."""
    human_answers, answers = read_human_answers(annotation_file), read_texts(result_file)
    require_same(answers, human_answers, result_file)
    return SoftAccuracyTask.summary(score_answers(human_answers, answers))


def submit_vqav2(dir: Path, ckpt: str, split: str) -> str:
    """`convert_vqav2_for_submission`: write `answers_upload/SPLIT/CKPT.json` for all of test2015."""
    target = dir / "answers_upload" / split / f"{ckpt}.json"
    write_vqav2(dir / JOIN_LIST, dir / "answers" / split / ckpt / "merge.jsonl", target)
    return f"{target}"


def submit_vizwiz(annotation_file: Path, result_file: Path, result_upload_file: Path) -> str:
    """`convert_vizwiz_for_submission`: write the upload of a complete answers file."""
    write_vizwiz(annotation_file, result_file, result_upload_file)
    return f"{result_upload_file}"
