"""GQA: exact match with the annotated answer, and the predictions file of the official scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from llava.eval.benchmarks.base import Layout, Scores, Task, count_unread, is_blank
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.run.answers import read_texts
from llava.eval.run.files import Record, Row, read_json, require_labels, require_same, write_json
from llava.eval.run.questions import QuestionId

LABELS = "data/testdev_balanced_questions.json"
PAGE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"


def prediction(text: str) -> str:
    """The compared form of an answer: lower case, without final periods."""
    return text.rstrip(".").lower()


def write_predictions(target: Path, answers: Mapping[QuestionId, str]) -> None:
    """Write the official `[{"questionId", "prediction"}]`."""
    write_json(target, [{"questionId": key, "prediction": prediction(text)} for key, text in answers.items()])


def is_correct(question: Record, text: str) -> bool:
    """Whether an answer matches the annotated one."""
    return prediction(text) == str(question["answer"]).lower()


def outcome(key: str, question: Record, text: str) -> Outcome:
    """The outcome of an answer, in the groups of `score_answers`."""
    kinds = ["all", *filter(None, [question.get("types", {}).get("structural")])]
    return Outcome(key, is_correct(question, text), [f"groups/{kind}/accuracy" for kind in kinds])


def score_answers(questions: Mapping[str, Record], answers: Mapping[QuestionId, str]) -> Scores:
    """Accuracy in percent, in total and per structural type.

    `questions` has the form of `testdev_balanced_questions.json`: id → `answer`, `types`.
    """
    groups: dict[str, list[bool]] = {"all": []}
    for key, question in questions.items():
        correct = is_correct(question, answers[key])
        groups["all"].append(correct)
        structural = question.get("types", {}).get("structural")
        if structural is not None:
            groups.setdefault(structural, []).append(correct)
    return {name: {"n": len(group), "accuracy": 100 * sum(group) / len(group)} for name, group in groups.items()}


class Gqa(Task):
    name: ClassVar[str] = "gqa"
    column = "GQA"
    folder = "gqa"
    layouts: ClassVar = {
        "testdev_balanced": Layout("llava_gqa_testdev_balanced.jsonl", "data/images", 12578, PAGE, {LABELS: PAGE})
    }

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        answers = {row["question_id"]: row["text"] for row in rows}
        write_predictions(path.with_name("testdev_balanced_predictions.json"), answers)
        labels = read_json(self.root / LABELS)
        require_labels(answers, labels, self.root / LABELS)
        groups = score_answers({key: labels[key] for key in answers}, answers)
        unread = count_unread(is_blank(prediction(text)) for text in answers.values())
        outcomes = [outcome(str(row["question_id"]), labels[row["question_id"]], row["text"]) for row in rows]
        overall = {"n": len(rows), "accuracy": groups["all"]["accuracy"], **unread}
        return {**overall, "groups": groups, "outcomes": outcomes}

    def references(self, rows: Sequence[Record]) -> list[str]:
        labels = read_json(self.root / LABELS)
        return [str(labels[row["question_id"]]["answer"]) for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        return "\n".join(
            f"{name:<12}{group['n']:>8}{group['accuracy']:>9.2f} %" for name, group in scores["groups"].items()
        )


def evaluate(question_file: Path, result_file: Path) -> str:
    """`eval_gqa`: score an answers file. Raises `DataError` unless it answers exactly the annotated questions."""
    questions = read_json(question_file)
    answers = read_texts(result_file)
    require_same(answers, questions, result_file)
    unread = count_unread(is_blank(prediction(text)) for text in answers.values())
    return Gqa.summary({"groups": score_answers(questions, answers), **unread})


def convert(src: Path, dst: Path) -> str:
    """`convert_gqa_for_eval`: write the official predictions file."""
    write_predictions(dst, read_texts(src))
    return ""
