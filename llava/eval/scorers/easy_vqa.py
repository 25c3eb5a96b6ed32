"""Scores of easy-VQA: exact match, beside what the question alone would give. Needs no model and no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.errors import DataError


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

    truths = sorted({item.truth for item in items})
    return {
        "n": len(items),
        **_accuracies(items, right),
        "question_only": _accuracies(items, guessed),
        "per_answer": {truth: _accuracy([item for item in items if item.truth == truth], right) for truth in truths},
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
