"""Scores of easy-VQA: exact match, beside what the question alone would give. Needs no model and no torch."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import RequiredFile, Task
from llava.eval.run.answers import Row, complete_answers
from llava.eval.run.questions import Question, spread


@dataclass(frozen=True)
class Item:
    """A question, the true answer, and the one given."""

    question: str
    truth: str
    answer: str

    @property
    def is_yes_no(self) -> bool:
        return self.truth in ("yes", "no")


def normalize(text: str) -> str:
    """Lower case, without surrounding space and a final period."""
    return text.strip().lower().removesuffix(".").strip()


def question_only(training: Iterable[tuple[str, str]]) -> dict[str, str]:
    """For every question text its most frequent training answer: all one can know without the picture.

    The answer first in the alphabet wins a tie.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in training:
        counts[question][answer] += 1
    return {question: min(found, key=lambda text: (-found[text], text)) for question, found in counts.items()}


def score(items: Sequence[Item], training: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Accuracy in percent overall, on yes/no and on open questions, per true answer, and of the question-only guess."""
    if not items:
        raise DataError("There are no answers to score.")
    guess = question_only(training)

    def right(item: Item) -> bool:
        return normalize(item.answer) == normalize(item.truth)

    def guessed(item: Item) -> bool:
        return guess.get(item.question) == item.truth

    references = sorted({item.truth for item in items})
    return {
        "n": len(items),
        **_accuracies(items, right),
        "question_only": _accuracies(items, guessed),
        "per_answer": {
            truth: _accuracy([item for item in items if item.truth == truth], right) for truth in references
        },
    }


def _accuracies(items: Sequence[Item], right: Callable[[Item], bool]) -> dict[str, Any]:
    return {
        "overall": _accuracy(items, right),
        "yes_no": _accuracy([item for item in items if item.is_yes_no], right),
        "open": _accuracy([item for item in items if not item.is_yes_no], right),
    }


def _accuracy(items: Sequence[Item], right: Callable[[Item], bool]) -> dict[str, Any]:
    correct = sum(map(right, items))
    return {"n": len(items), "correct": correct, "accuracy": 100 * correct / len(items) if items else None}


def table(score: dict[str, Any]) -> str:
    """The scores as a text table, one line a group."""

    def percent(group: dict[str, Any]) -> str:
        return "–" if group["accuracy"] is None else f"{group['accuracy']:.2f} %"

    lines = [f"{'':<12}{'questions':>10}{'accuracy':>12}{'question only':>16}"]
    for key, label in (("overall", "overall"), ("yes_no", "yes / no"), ("open", "open")):
        group, guess = score[key], score["question_only"][key]
        lines.append(f"{label:<12}{group['n']:>10}{percent(group):>12}{percent(guess):>16}")
    lines += [f"{truth:<12}{group['n']:>10}{percent(group):>12}" for truth, group in score["per_answer"].items()]
    return "\n".join(lines)


# --- easy-VQA ---------------------------------------------------------------------------------------------------------


INSTALL = "pip install easy-vqa==1.0"


def package_data() -> Path:
    """The data folder of the installed package, which is never imported; `DataError` when it is absent."""
    spec = importlib.util.find_spec("easy_vqa")
    locations = spec.submodule_search_locations if spec is not None else None
    if not locations:
        raise DataError(f"The easy-VQA data is not installed; run: {INSTALL}, or give --data-root.")
    return Path(locations[0]) / "data"


class EasyVQA(Task):
    """`data_root` holds `{train,test}/questions.json` and `{train,test}/images/N.png`; default: the package's."""

    name: ClassVar[str] = "easy_vqa"
    splits: ClassVar[tuple[str, ...]] = ("test", "train")
    max_new_tokens: ClassVar[int] = 16

    @property
    def root(self) -> Path:
        return self.data_root if self.data_root is not None else package_data()

    @property
    def image_folder(self) -> Path:
        return self.root / self.split / "images"

    def needs(self) -> Sequence[RequiredFile]:
        source = f"PyPI ({INSTALL})"
        rows = {"test": 9673, "train": 38575}
        splits = sorted(rows, key=lambda split: split != self.split)  # its own first
        files = [RequiredFile(self.root / split / "questions.json", source, rows[split]) for split in splits]
        return [*files, RequiredFile(self.image_folder, source)]

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        rows = spread(self._read(self.split), limit)
        return [Question(index, question, (f"{image}.png",)) for index, (question, _, image) in rows]

    def score(self, answers: Path, limit: int | None = None) -> dict[str, Any]:
        rows = spread(self._read(self.split), limit)
        given = complete_answers(answers, self.questions(limit))
        items = [Item(question, truth, answer["text"]) for (_, (question, truth, _)), answer in zip(rows, given)]
        training = [(question, truth) for _, (question, truth, _) in self._read("train")]
        return {"task": self.name, "split": self.split, **score(items, training)}

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        found = score["overall"]["accuracy"]
        return None if found is None else float(found)

    def references(self, rows: Sequence[Row]) -> list[str]:
        known = self._read(self.split)
        return [known[int(row["question_id"])][1][1] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(score)

    def _read(self, split: str) -> list[tuple[int, tuple[str, str, int]]]:
        """Question numbers with (question, answer, image number), in official order."""
        path = self.root / split / "questions.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [
                (index, (str(question), str(answer), int(image)))
                for index, (question, answer, image) in enumerate(rows)
            ]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"Cannot read {path} ({error}); reinstall the data: {INSTALL}.") from error
