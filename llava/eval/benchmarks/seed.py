"""SEED-Bench: multiple-choice accuracy per question type, for images and video frames, and the file to upload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import Layout, RequiredFile, Scores, Task, count_unread
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.benchmarks.parsing import parse_option
from llava.eval.run.answers import read_results
from llava.eval.run.files import Record, Row, by_key, read_json, require_labels, require_same, write_jsonl
from llava.eval.run.questions import QuestionId

PAGE = "https://github.com/AILab-CVC/SEED-Bench"


def plain_id(question_id: QuestionId) -> QuestionId:
    """The id as an integer if it is one, so that `103` and `"103"` are equal."""
    text = str(question_id)
    return int(text) if text.isdecimal() else question_id


def read_annotation(path: Path) -> Row:
    """`SEED-Bench.json` with at least one question."""
    annotation = read_json(path)
    if not isinstance(annotation, dict) or not annotation.get("questions"):
        raise DataError(f"{path} has no 'questions'; expected SEED-Bench.json.")
    return annotation


def upload_rows(questions: Sequence[Record], answers: Mapping[QuestionId, str]) -> list[Row]:
    """Rows of the upload, with ids as annotated; `answers` are texts by `plain_id`."""
    ids = [question["question_id"] for question in questions]
    return [{"question_id": each, "prediction": answers[plain_id(each)]} for each in ids]


def is_correct(question: Record, text: str) -> bool:
    """The published rule."""
    return bool(text == question["answer"])


def is_correct_lenient(question: Record, text: str) -> bool:
    """The rule of `parse_option`."""
    options = {letter: str(question.get(f"choice_{letter.lower()}", "")) for letter in "ABCD"}
    return bool(parse_option(text, options) == question["answer"])


def outcome(question: Record, text: str, types: Mapping[int, str]) -> Outcome:
    """The outcome of an answer, in the groups of `score_answers`; `types` are names of question types by number."""
    groups = [f"types/{types[question['question_type_id']]}", f"kinds/{question['data_type']}"]
    lenient = {"lenient": float(is_correct_lenient(question, text))}
    return Outcome(str(question["question_id"]), is_correct(question, text), groups, lenient)


def score_answers(annotation: Record, answers: Mapping[QuestionId, str]) -> Scores:
    """Accuracies in percent: per question type in the order of their ids, in total, and per data type.

    `answers` are texts by `plain_id`. The exact letter is correct, as published, and other answers are unread;
    `lenient` reads them by `parse_option`.
    """
    names = {number: name for name, number in annotation["question_type"].items()}
    questions = annotation["questions"]

    def text(question: Record) -> str:
        return answers.get(plain_id(question["question_id"]), "")

    def accuracy(group: Sequence[Record], rule: Callable[[Record, str], bool] = is_correct) -> float:
        return 100 * sum(rule(question, text(question)) for question in group) / len(group)

    unread = count_unread(text(question) not in tuple("ABCD") for question in questions)
    by_type = {number: [q for q in questions if q["question_type_id"] == number] for number in sorted(names)}
    by_kind = {kind: [q for q in questions if q["data_type"] == kind] for kind in ("image", "video")}
    return {
        "n": len(questions),
        **unread,
        "types": {names[number]: accuracy(group) for number, group in by_type.items() if group},
        "total": accuracy(questions),
        "lenient": accuracy(questions, is_correct_lenient),
        "kinds": {kind: accuracy(group) for kind, group in by_kind.items() if group},
    }


class SeedBench(Task):
    """Images are in two folders beside the question file; the second one has video frames."""

    name: ClassVar[str] = "seed"
    column = "SEED"
    metric = "total"
    overall = "total"
    folder = "seed_bench"
    layouts: ClassVar = {"test": Layout("llava-seed-bench.jsonl", ".", 19242, PAGE, {"SEED-Bench.json": PAGE})}

    def required_files(self) -> Sequence[RequiredFile]:
        folders = {"SEED-Bench-image": PAGE, "SEED-Bench-video-image": f"{PAGE}: the middle frames of its videos"}
        files = super().required_files()[:-1]
        return [*files, *(RequiredFile(self.root / name, source) for name, source in folders.items())]

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        annotation = read_annotation(self.root / "SEED-Bench.json")
        answers = {plain_id(row["question_id"]): row["text"] for row in rows}
        annotated = {plain_id(question["question_id"]) for question in annotation["questions"]}
        require_labels(answers, annotated, self.root / "SEED-Bench.json")
        asked = [question for question in annotation["questions"] if plain_id(question["question_id"]) in answers]
        target = path.with_name("upload.jsonl")
        write_jsonl(target, upload_rows(asked, answers))
        types = {number: name for name, number in annotation["question_type"].items()}
        by_id = {plain_id(question["question_id"]): question for question in asked}
        outcomes = [outcome(by_id[plain_id(row["question_id"])], row["text"], types) for row in rows]
        return {
            **score_answers({**annotation, "questions": asked}, answers), "upload": str(target), "outcomes": outcomes
        }  # fmt: skip

    def references(self, rows: Sequence[Record]) -> list[str]:
        questions = read_annotation(self.root / "SEED-Bench.json")["questions"]
        answers = {plain_id(question["question_id"]): str(question["answer"]) for question in questions}
        return [answers[plain_id(row["question_id"])] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        lines = [f"{name}: {value:.2f}%" for name, value in scores["types"].items()]
        lines.append(f"Total accuracy: {scores['total']:.2f}%")
        lines += [f"{kind} accuracy: {value:.2f}%" for kind, value in scores["kinds"].items()]
        lines.append(f"lenient accuracy (sentences, brackets, option texts): {scores['lenient']:.2f} %")
        return "\n".join(lines)


def evaluate(annotation_file: Path, result_file: Path, result_upload_file: Path) -> str:
    """`convert_seed_for_submission`: score an answers file and write the upload.

    Raises `DataError` unless the file answers exactly the annotated questions.
    """
    annotation = read_annotation(annotation_file)
    rows = [{**row, "question_id": plain_id(row["question_id"])} for row in read_results(result_file)]
    answers = {key: row["text"] for key, row in by_key(rows, result_file, "question_id").items()}
    asked = [plain_id(question["question_id"]) for question in annotation["questions"]]
    require_same(answers, asked, result_file)
    write_jsonl(result_upload_file, upload_rows(annotation["questions"], answers))
    return SeedBench.summary(score_answers(annotation, answers))
