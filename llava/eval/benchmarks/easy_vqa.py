"""easy-VQA: exact match, compared with a baseline that knows only the question."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

from llava.errors import DataError
from llava.eval.benchmarks.base import Layout, Scores, Task
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.run.files import Record, Row
from llava.eval.run.questions import Question

INSTALL = "pip install easy-vqa==1.0"
PYPI = f"PyPI ({INSTALL})"


@dataclass(frozen=True)
class Prediction:
    """A question, its reference answer, and the model's answer."""

    question: str
    reference: str
    answer: str

    @property
    def kind(self) -> str:
        return "yes_no" if self.reference in ("yes", "no") else "open"

    @property
    def is_correct(self) -> bool:
        return normalize(self.answer) == normalize(self.reference)

    def outcome(self, key: str, baseline: Mapping[str, str]) -> Outcome:
        """The outcome of the answer and of the baseline, in the groups of `score_predictions`."""
        groups = [f"{self.kind}/accuracy", f"per_answer/{self.reference}/accuracy"]
        known = float(baseline.get(self.question) == self.reference)
        values = {f"question_only/{name}/accuracy": known for name in ("overall", self.kind)}
        return Outcome(key, self.is_correct, groups, values)


class Accuracy(TypedDict):
    """Number of questions, correct answers, and accuracy in percent (None without questions)."""

    n: int
    correct: int
    accuracy: float | None


def read_items(path: Path) -> list[tuple[str, str, int]]:
    """Question, answer and image number of each row of a `questions.json`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(str(question), str(answer), int(image)) for question, answer, image in rows]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"Cannot read {path} ({error}); reinstall the data: {INSTALL}.") from error


def normalize(text: str) -> str:
    """Lower case, without surrounding whitespace and one final period."""
    return text.strip().lower().removesuffix(".").strip()


def question_only_baseline(training: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The most frequent training answer to each question, the first in alphabetical order for ties."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in training:
        counts[question][answer] += 1
    return {question: min(found, key=lambda text: (-found[text], text)) for question, found in counts.items()}


def score_predictions(predictions: Sequence[Prediction], training: Iterable[tuple[str, str]]) -> Scores:
    """Accuracies overall, of yes/no and open questions and per reference answer, and those of the baseline."""
    if not predictions:
        raise DataError("There are no answers to score.")
    baseline = question_only_baseline(training)

    def is_correct(item: Prediction) -> bool:
        return item.is_correct

    def baseline_is_correct(item: Prediction) -> bool:
        return baseline.get(item.question) == item.reference

    per_answer = {
        reference: _accuracy([item for item in predictions if item.reference == reference], is_correct)
        for reference in sorted({item.reference for item in predictions})
    }
    return {
        "n": len(predictions),
        **_by_kind(predictions, is_correct),
        "question_only": _by_kind(predictions, baseline_is_correct),
        "per_answer": per_answer,
    }


def _by_kind(items: Sequence[Prediction], is_correct: Callable[[Prediction], bool]) -> dict[str, Accuracy]:
    return {
        "overall": _accuracy(items, is_correct),
        "yes_no": _accuracy([item for item in items if item.kind == "yes_no"], is_correct),
        "open": _accuracy([item for item in items if item.kind == "open"], is_correct),
    }


def _accuracy(items: Sequence[Prediction], is_correct: Callable[[Prediction], bool]) -> Accuracy:
    correct = sum(map(is_correct, items))
    return {"n": len(items), "correct": correct, "accuracy": 100 * correct / len(items) if items else None}


def package_data() -> Path:
    """The data folder of the installed package, without importing it. Raises `DataError` if it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    locations = spec.submodule_search_locations if spec is not None else None
    if not locations:
        raise DataError(f"The easy-VQA data is not installed; run: {INSTALL}, or give --data-root.")
    return Path(locations[0]) / "data"


class EasyVQA(Task):
    """The data is `package_data` unless `data_root` is given."""

    name: ClassVar[str] = "easy_vqa"
    metric = "overall/accuracy"
    overall = "overall/accuracy"
    max_new_tokens: ClassVar[int] = 16
    layouts: ClassVar = {
        "test": Layout("test/questions.json", "test/images", 9673, PYPI, {"train/questions.json": PYPI}, PYPI),
        "train": Layout("train/questions.json", "train/images", 38575, PYPI, source=PYPI),
    }

    @classmethod
    def default_root(cls, eval_data: Path) -> None:
        return None

    @property
    def root(self) -> Path:
        return self.data_root or package_data()

    def read_questions(self, path: Path) -> Sequence[Question]:
        return [
            Question(index, question, (f"{image}.png",)) for index, (question, _, image) in enumerate(read_items(path))
        ]

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        references = self.references(rows)
        predictions = [Prediction(row["prompt"], reference, row["text"]) for row, reference in zip(rows, references)]
        training = [(question, answer) for question, answer, _ in read_items(self.root / "train" / "questions.json")]
        baseline = question_only_baseline(training)
        keys = (str(row["question_id"]) for row in rows)
        outcomes = [item.outcome(key, baseline) for key, item in zip(keys, predictions)]
        return {**score_predictions(predictions, training), "outcomes": outcomes}

    def primary_metric(self, scores: Scores) -> float | None:
        found = scores["overall"]["accuracy"]
        return None if found is None else float(found)

    def references(self, rows: Sequence[Record]) -> list[str]:
        items = read_items(self.question_path)
        return [items[int(row["question_id"])][1] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        """One line per group of questions."""

        def percent(group: Accuracy) -> str:
            return "–" if group["accuracy"] is None else f"{group['accuracy']:.2f} %"

        lines = [f"{'':<12}{'questions':>10}{'accuracy':>12}{'question only':>16}"]
        for key, label in (("overall", "overall"), ("yes_no", "yes / no"), ("open", "open")):
            group, baseline = scores[key], scores["question_only"][key]
            lines.append(f"{label:<12}{group['n']:>10}{percent(group):>12}{percent(baseline):>16}")
        for reference, group in scores["per_answer"].items():
            lines.append(f"{reference:<12}{group['n']:>10}{percent(group):>12}")
        return "\n".join(lines)
