"""SEED-Bench: accuracy per question type, pictures and videos apart, and the file to upload (spec/eval.md §4.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import FileTask, Layout, RequiredFile
from llava.eval.benchmarks.parsing import read_option
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_json, read_results, require_same, write_jsonl

KINDS = ("image", "video")


def plain_id(question_id: Any) -> Any:
    """An integer where the id is one, so that `103` and `"103"` meet."""
    text = str(question_id)
    return int(text) if text.isdecimal() else question_id


def read_annotation(path: Path) -> dict[str, Any]:
    """`SEED-Bench.json`, with at least one question."""
    annotation = read_json(path)
    if not isinstance(annotation, dict) or not annotation.get("questions"):
        raise DataError(f"{path} has no 'questions'; expected SEED-Bench.json.")
    return annotation


def upload(questions: Sequence[Mapping[str, Any]], answers: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Rows for the server, ids as annotated; `answers` are texts by `plain_id`."""
    asked = [question["question_id"] for question in questions]
    return [{"question_id": each, "prediction": answers[plain_id(each)]} for each in asked]


def score(annotation: Mapping[str, Any], answers: Mapping[Any, str]) -> dict[str, Any]:
    """Accuracies in percent: per type in the order of their ids, in total, and per kind that occurs.

    `answers` are texts by `plain_id`. Right is the letter exactly; `lenient` also accepts `B.`, `(B)`, or the option.
    """
    names = {number: name for name, number in annotation["question_type"].items()}
    questions = annotation["questions"]

    def right(question: Mapping[str, Any]) -> bool:
        return bool(answers.get(plain_id(question["question_id"])) == question["answer"])

    def leniently(question: Mapping[str, Any]) -> bool:
        options = {letter: str(question.get(f"choice_{letter.lower()}", "")) for letter in "ABCD"}
        return bool(read_option(answers.get(plain_id(question["question_id"]), ""), options) == question["answer"])

    def accuracy(members: Sequence[Mapping[str, Any]]) -> float:
        return 100 * sum(map(right, members)) / len(members)

    by_type = {number: [q for q in questions if q["question_type_id"] == number] for number in sorted(names)}
    by_kind = {kind: [q for q in questions if q["data_type"] == kind] for kind in KINDS}
    return {
        "n": len(questions),
        "types": {names[number]: accuracy(members) for number, members in by_type.items() if members},
        "total": accuracy(questions),
        "lenient": 100 * sum(map(leniently, questions)) / len(questions),
        "kinds": {kind: accuracy(members) for kind, members in by_kind.items() if members},
    }


def table(result: Mapping[str, Any]) -> str:
    lines = [f"{name}: {value:.2f}%" for name, value in result["types"].items()]
    lines.append(f"Total accuracy: {result['total']:.2f}%")
    lines += [f"{kind} accuracy: {value:.2f}%" for kind, value in result["kinds"].items()]
    return "\n".join((*lines, f"read leniently (brackets, periods, option texts): {result['lenient']:.2f} %"))


def evaluate(annotation_file: Path, result_file: Path, result_upload_file: Path) -> str:
    """Print the accuracies and write the upload; `DataError` unless exactly the annotated questions are answered."""
    annotation = read_annotation(annotation_file)
    rows = [{**row, "question_id": plain_id(row["question_id"])} for row in read_results(result_file)]
    answers = {key: row["text"] for key, row in by_key(rows, result_file, "question_id").items()}
    asked = [question["question_id"] for question in annotation["questions"]]
    require_same(answers, map(plain_id, asked), result_file)
    write_jsonl(result_upload_file, upload(annotation["questions"], answers))
    return table(score(annotation, answers))


# --- SEED-Bench -------------------------------------------------------------------------------------------------------


PAGE = "https://github.com/AILab-CVC/SEED-Bench"


class SeedBench(FileTask):
    """Pictures are in two folders beside the question file, frames of videos in the second."""

    name: ClassVar[str] = "seed"
    column = "SEED"
    folder = "seed_bench"
    layouts: ClassVar = {"test": Layout("llava-seed-bench.jsonl", ".", 19242, PAGE, {"SEED-Bench.json": PAGE})}
    splits = ("test",)

    def needs(self) -> Sequence[RequiredFile]:
        folders = {"SEED-Bench-image": PAGE, "SEED-Bench-video-image": f"{PAGE}: the middle frames of its videos"}
        return [*super().needs()[:-1], *(RequiredFile(self.root / name, source) for name, source in folders.items())]

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        annotation = read_annotation(self.root / "SEED-Bench.json")
        answers = {plain_id(row["question_id"]): row["text"] for row in rows}
        asked = [each for each in annotation["questions"] if plain_id(each["question_id"]) in answers]
        target = path.with_name("upload.jsonl")
        write_jsonl(target, upload(asked, answers))
        return {**score({**annotation, "questions": asked}, answers), "upload": str(target)}

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        return float(score["total"])

    def references(self, rows: Sequence[Row]) -> list[str]:
        questions = read_annotation(self.root / "SEED-Bench.json")["questions"]
        answers = {plain_id(each["question_id"]): str(each["answer"]) for each in questions}
        return [answers[plain_id(row["question_id"])] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(score)
