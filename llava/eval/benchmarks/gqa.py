"""GQA: exact match with the annotated answer, and the official predictions file (spec/eval.md §4.8, §6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.benchmarks.base import FileTask, Layout
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_json, read_results, require_same, write_json


def prediction(text: str) -> str:
    """What is compared: lower case, without final periods."""
    return text.rstrip(".").lower()


def convert(src: Path, dst: Path) -> str:
    """Write the official `[{"questionId", "prediction"}]`."""
    rows = by_key(read_results(src), src, "question_id")
    write_json(dst, [{"questionId": key, "prediction": prediction(row["text"])} for key, row in rows.items()])
    return ""


def score(questions: Mapping[str, Mapping[str, Any]], answers: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy in percent over `testdev_balanced_questions.json` (id → `answer`, `types`), and per structural type."""
    groups: dict[str, list[bool]] = {"all": []}
    for key, question in questions.items():
        right = prediction(answers[key]) == question["answer"].lower()
        groups["all"].append(right)
        kind = question.get("types", {}).get("structural")
        if kind is not None:
            groups.setdefault(kind, []).append(right)
    return {name: {"n": len(found), "accuracy": 100 * sum(found) / len(found)} for name, found in groups.items()}


def table(result: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(f"{name:<12}{found['n']:>8}{found['accuracy']:>9.2f} %" for name, found in result.items())


def evaluate(question_file: Path, result_file: Path) -> str:
    """Score an answers file; `DataError` unless it answers exactly the annotated questions."""
    questions = read_json(question_file)
    answers = {key: row["text"] for key, row in by_key(read_results(result_file), result_file, "question_id").items()}
    require_same(answers, questions, result_file)
    return table(score(questions, answers))


# --- GQA --------------------------------------------------------------------------------------------------------------


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
        official = [{"questionId": key, "prediction": prediction(text)} for key, text in answers.items()]
        write_json(path.with_name("testdev_balanced_predictions.json"), official)
        labels = read_json(self.root / LABELS)
        groups = score({key: labels[key] for key in answers}, answers)
        return {"n": len(rows), "accuracy": groups["all"]["accuracy"], "groups": groups}

    def references(self, rows: Sequence[Row]) -> list[str]:
        labels = read_json(self.root / LABELS)
        return [str(labels[row["question_id"]]["answer"]) for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(score["groups"])
