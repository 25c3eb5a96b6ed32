"""POPE: does the model see objects that are not there? (spec/eval.md §4.3; published: the mean of the three F1).

Labels are found by picture and question, not by line (defect M1), with `imange` read as `image`, as some files say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import COCO, FileTask, Layout
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_results, read_rows, require_same

PREFIX, SUFFIX = "coco_pope_", ".json"
YES, NO, OTHER = "yes", "no", "other"
QUESTION_KEYS = ("question_id", "image", "text", "category")


def parse(text: str) -> str:
    """The published rule: no if one of the first sentence's words is `No`, `no` or `not`, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def parse_strictly(text: str) -> str:
    """Yes or no only for an answer whose first word says so, whatever its case; else other (defect M2)."""
    words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
    return words[0] if words and words[0] in (YES, NO) else OTHER


@dataclass(frozen=True)
class Counts:
    """Right and wrong answers of one category, `other` those that the strict rule does not accept."""

    tp: int
    fp: int
    tn: int
    fn: int
    other: int

    @property
    def n(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    def metrics(self) -> dict[str, Any]:
        """The five published figures, each 0 where it would be 0 / 0 (defect M3)."""
        precision = self.tp / (self.tp + self.fp) if self.tp + self.fp else 0.0
        recall = self.tp / (self.tp + self.fn) if self.tp + self.fn else 0.0
        return {
            "n": self.n,
            "counts": [self.tp, self.fp, self.tn, self.fn],
            "accuracy": (self.tp + self.tn) / self.n,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "yes_ratio": (self.tp + self.fp) / self.n,
            "other": self.other,
        }


def count(pairs: Sequence[tuple[str, str]]) -> Counts:
    """Counts over (answer text, label)."""
    found = [(parse(text), label) for text, label in pairs]
    return Counts(
        found.count((YES, YES)), found.count((YES, NO)), found.count((NO, NO)), found.count((NO, YES)),
        sum(parse_strictly(text) == OTHER for text, _ in pairs),
    )  # fmt: skip


def label_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Picture and question: what a label and a question file have in common."""
    return row["image"], row["text"].split("\n")[0].strip().replace("imange", "image")


def read_labels(folder: Path) -> dict[str, dict[tuple[str, str], str]]:
    """For each category (`coco_pope_CATEGORY.json`; other files are left alone) the labels by `label_key`."""
    labels: dict[str, dict[tuple[str, str], str]] = {}
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        found = labels.setdefault(path.name.removeprefix(PREFIX).removesuffix(SUFFIX), {})
        for row in read_rows(path, "image", "text", "label"):
            if label_key(row) in found or row["label"] not in (YES, NO):
                raise DataError(f"{path} has a duplicate question or a label that is not yes or no: {label_key(row)}.")
            found[label_key(row)] = row["label"]
    if not labels:
        raise DataError(f"{folder} has no {PREFIX}*{SUFFIX}; the label files come from POPE's repository.")
    return labels


def score(folder: Path, question_file: Path, result_file: Path) -> dict[str, Any]:
    """Figures of each category and the mean F1 in percent; `DataError` unless answers, questions and labels match."""
    labels = read_labels(folder)
    questions = read_rows(question_file, *QUESTION_KEYS)
    answers = by_key(read_results(result_file), result_file, "question_id")
    require_same(answers, by_key(questions, question_file, "question_id"), result_file)
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for row in questions:
        asked.setdefault(row["category"], []).append(row)
    if asked.keys() != labels.keys():
        raise DataError(
            f"The questions are of the categories {', '.join(sorted(asked))}, but {folder} has labels of "
            f"{', '.join(labels)}; not scored, because some would stay without."
        )
    for category, rows in asked.items():
        _require_labels([label_key(row) for row in rows], labels[category], folder / f"{PREFIX}{category}{SUFFIX}")
    return score_answers(labels, questions, {key: row["text"] for key, row in answers.items()})


def score_answers(
    labels: Mapping[str, Mapping[tuple[str, str], str]],
    questions: Sequence[Mapping[str, Any]],
    answers: Mapping[Any, str],
) -> dict[str, Any]:
    """The same for `questions` only, which have labels; `answers` are texts by `question_id`."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for row in questions:
        label = labels[row["category"]][label_key(row)]
        pairs.setdefault(row["category"], []).append((answers[row["question_id"]], label))
    categories = {category: count(pairs[category]).metrics() for category in sorted(pairs)}
    mean = 100 * sum(result["f1"] for result in categories.values()) / len(categories)
    return {"mean_f1": mean, "categories": categories}


def _require_labels(asked: Sequence[tuple[str, str]], labels: Mapping[tuple[str, str], str], path: Path) -> None:
    without, extra = set(asked) - labels.keys(), labels.keys() - set(asked)
    if without or extra or len(set(asked)) < len(asked):
        raise DataError(
            f"{path.name} does not match the questions: {len(without)} without a label, {len(extra)} extra labels "
            "(unmatched rows); not scored. Use the label files of the commit that docs/Evaluation.md names."
        )


def table(result: Mapping[str, Any]) -> str:
    """The published lines, then the mean F1."""
    lines = []
    for category, found in result["categories"].items():
        counts = "\t".join(map(str, found["counts"]))
        row = [found[key] for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")]
        lines += [
            f"Category: {category}, # samples: {found['n']}",
            f"TP\tFP\tTN\tFN\t\n{counts}",
            f"Accuracy: {found['accuracy']}",
            f"Precision: {found['precision']}",
            f"Recall: {found['recall']}",
            f"F1 score: {found['f1']}",
            f"Yes ratio: {found['yes_ratio']}",
            ", ".join(f"{value:.3f}" for value in row),
            "=" * 36,
        ]
    other = sum(found["other"] for found in result["categories"].values())
    lines.append(f"Mean F1 x 100: {result['mean_f1']:.3f} (answers not starting with yes or no: {other})")
    return "\n".join(lines)


def evaluate(annotation_dir: Path, question_file: Path, result_file: Path) -> str:
    return table(score(annotation_dir, question_file, result_file))


# --- POPE -------------------------------------------------------------------------------------------------------------


LABELS = "https://github.com/AoiDragon/POPE, output/coco (the random file has 2,910 lines; docs/Evaluation.md)"


class Pope(FileTask):
    name: ClassVar[str] = "pope"
    column = "POPE"
    folder = "pope"
    layouts: ClassVar = {
        "test": Layout(
            "llava_pope_test.jsonl", "val2014", 8910, f"{COCO}val2014.zip",
            {f"coco/coco_pope_{kind}.json": LABELS for kind in ("adversarial", "popular", "random")},
        )
    }  # fmt: skip
    splits = tuple(layouts)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        asked = self._asked()
        answers = {row["question_id"]: row["text"] for row in rows}
        return score_answers(read_labels(self.root / "coco"), [asked[key] for key in answers], answers)

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        return float(score["mean_f1"])

    def references(self, rows: Sequence[Row]) -> list[str]:
        labels, asked = read_labels(self.root / "coco"), self._asked()
        questions = [asked[row["question_id"]] for row in rows]
        return [labels[each["category"]][label_key(each)] for each in questions]

    def _asked(self) -> dict[Any, Row]:
        return {row["question_id"]: row for row in read_rows(self.question_path, *QUESTION_KEYS)}

    def table(self, score: dict[str, Any]) -> str:
        return table(score)
