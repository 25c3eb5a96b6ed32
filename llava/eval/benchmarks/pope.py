"""POPE: object hallucination, yes/no questions in three categories. Published: the mean of the three F1 scores.

Labels are joined by image and question, with `imange` read as `image`: some of the published files have this typo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llava.errors import DataError
from llava.eval.benchmarks.base import COCO, Layout, Reading, Scores, Task, count_unread, is_blank
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.run.answers import read_texts
from llava.eval.run.files import Record, Row, by_key, read_rows, require_labels, require_same
from llava.eval.run.questions import QuestionId

if TYPE_CHECKING:
    from llava.eval.outcomes import Outcomes
    from llava.eval.uncertainty import Floats, Metric

PREFIX, SUFFIX = "coco_pope_", ".json"
YES, NO, OTHER = "yes", "no", "other"
BOTH = re.compile(r"\W*(?:yes|no)\W+(?:(?:and|or)\W+)?(?:yes|no)\b", re.IGNORECASE)
UNSURE = {"sure", "unsure", "unclear", "cannot", "can't", "unable", "sorry", "maybe", "perhaps"}
QUESTION_KEYS = ("question_id", "image", "text", "category")
LABELS = "https://github.com/AoiDragon/POPE, output/coco (the random file has 2,910 lines; docs/Evaluation.md)"

Labels = Mapping[str, Mapping[tuple[str, str], str]]  # category → `label_key` → yes or no


def label_key(row: Record) -> tuple[str, str]:
    """Image and question of a row of a label or question file."""
    return row["image"], row["text"].split("\n")[0].strip().replace("imange", "image")


def read_labels(folder: Path) -> dict[str, dict[tuple[str, str], str]]:
    """The labels of each `coco_pope_CATEGORY.json`; other files are ignored."""
    labels: dict[str, dict[tuple[str, str], str]] = {}
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        category = labels.setdefault(path.name.removeprefix(PREFIX).removesuffix(SUFFIX), {})
        for row in read_rows(path, "image", "text", "label"):
            if label_key(row) in category or row["label"] not in (YES, NO):
                raise DataError(f"{path} has a duplicate question or a label other than yes and no: {label_key(row)}.")
            category[label_key(row)] = row["label"]
    if not labels:
        raise DataError(f"{folder} has no {PREFIX}*{SUFFIX}; download the label files from POPE's repository.")
    return labels


def parse(text: str) -> str:
    """The published rule: no if the first sentence contains the word `No`, `no` or `not`, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def parse_strict(text: str) -> str:
    """Yes or no if it is the first word in any case, else other."""
    words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
    return words[0] if words and words[0] in (YES, NO) else OTHER


def is_unread(text: str) -> bool:
    """Whether `parse` reads what the answer does not say: neither yes nor no, both, doubt, or a no in other words."""
    first = parse_strict(text)
    if first != OTHER:
        return first != parse(text) or BOTH.match(text) is not None
    words = set(re.findall(r"[a-z']+", text.lower()))
    return (YES in words) == bool(words & {NO, "not"}) or bool(words & UNSURE)


def outcome(row: Record, label: str, text: str) -> Outcome:
    """The outcome of an answer: an empty one is wrong, though the published rule reads `yes`."""
    yes = parse(text) == YES
    values = {"yes": float(yes), "label": float(label == YES)}
    correct = not is_blank(text) and yes == (label == YES)
    return Outcome(str(row["question_id"]), correct, [f"categories/{row['category']}"], values)


@dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of one category; `other` counts the answers that `parse_strict` does not accept."""

    tp: int
    fp: int
    tn: int
    fn: int
    other: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]]) -> ConfusionMatrix:
        """The counts over (answer, label)."""
        parsed = [(parse(text), label) for text, label in pairs]
        tp, fp, tn, fn = (parsed.count(cell) for cell in ((YES, YES), (YES, NO), (NO, NO), (NO, YES)))
        return cls(tp, fp, tn, fn, sum(parse_strict(text) == OTHER for text, _ in pairs))

    def metrics(self) -> Scores:
        """The published metrics, 0 where the denominator is 0."""
        n = self.tp + self.fp + self.tn + self.fn
        precision = self.tp / (self.tp + self.fp) if self.tp + self.fp else 0.0
        recall = self.tp / (self.tp + self.fn) if self.tp + self.fn else 0.0
        return {
            "n": n,
            "counts": [self.tp, self.fp, self.tn, self.fn],
            "accuracy": (self.tp + self.tn) / n,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "yes_ratio": (self.tp + self.fp) / n,
            "other": self.other,
        }


def score_answers(labels: Labels, questions: Sequence[Record], answers: Mapping[QuestionId, str]) -> Scores:
    """Metrics of each category as published, and the mean F1 in percent, over `questions`.

    In `mean_f1`, empty answers are wrong; the published rule, which reads them as yes, gives `published_mean_f1`.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for row in questions:
        label = labels[row["category"]][label_key(row)]
        pairs.setdefault(row["category"], []).append((answers[row["question_id"]], label))
    wrong = {YES: NO, NO: YES}
    judged = {
        name: [(wrong[label] if is_blank(text) else text, label) for text, label in pairs[name]] for name in pairs
    }

    def metrics(groups: Mapping[str, Sequence[tuple[str, str]]]) -> tuple[float, Scores]:
        found = {name: ConfusionMatrix.of(groups[name]).metrics() for name in sorted(groups)}
        return 100 * sum(each["f1"] for each in found.values()) / len(found), found

    published, categories = metrics(pairs)
    unread = count_unread(is_unread(text) for group in pairs.values() for text, _ in group)
    return {"mean_f1": metrics(judged)[0], "published_mean_f1": published, **unread, "categories": categories}


class Pope(Task):
    name: ClassVar[str] = "pope"
    column = "POPE"
    metric = "mean_f1"
    folder = "pope"
    layouts: ClassVar = {
        "test": Layout(
            "llava_pope_test.jsonl", "val2014", 8910, f"{COCO}val2014.zip",
            {f"coco/coco_pope_{kind}.json": LABELS for kind in ("adversarial", "popular", "random")},
        )
    }  # fmt: skip

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        answers = {row["question_id"]: row["text"] for row in rows}
        labels, questions = read_labels(self.root / "coco"), self._question_rows(rows)
        labelled = {(category, *key) for category, keys in labels.items() for key in keys}
        require_labels([(row["category"], *label_key(row)) for row in questions], labelled, self.root / "coco")
        outcomes = [
            outcome(row, labels[row["category"]][label_key(row)], answers[row["question_id"]]) for row in questions
        ]
        return {**score_answers(labels, questions, answers), "outcomes": outcomes}

    @classmethod
    def metrics(cls, outcomes: Outcomes) -> list[Metric]:
        """Mean F1 with empty answers as wrong, and as published; published rates per category and over all."""
        from llava.eval.uncertainty import Metric, combine, confusion_rates

        label, rates = outcomes.values["label"], confusion_rates()
        judged = (outcomes.scores == label).astype(float)  # yes, if right about a present object or wrong about another

        def cells(name: str, yes: Floats) -> Floats:
            """tp, fp, tn, fn by image."""
            pairs = ((yes, label), (yes, 1 - label), (1 - yes, 1 - label), (1 - yes, label))
            return outcomes.sums(*(outcomes.groups[name] * ours * theirs for ours, theirs in pairs))

        found, counts = [], {}
        for mean, yes in (("mean_f1", judged), ("published_mean_f1", outcomes.values["yes"])):
            counts = {name: cells(name, yes) for name in outcomes.groups}
            scores = [Metric(mean, each, rates["f1"], (0.0, 1.0)) for each in counts.values()]
            found.append(combine(mean, scores, 100 / len(scores)))
        first, *others = counts.values()
        counts["pooled"] = sum(others, first)
        parts = [(f"{name}/{rate}", counts[name], value) for name in counts for rate, value in rates.items()]
        return [*found, *(Metric(name, sums, value, (0.0, 1.0)) for name, sums, value in parts)]

    def readings(self, rows: Sequence[Row]) -> list[Reading]:
        texts = [row["text"] for row in rows]
        return [Reading("" if is_blank(text) else parse(text), is_unread(text)) for text in texts]

    def references(self, rows: Sequence[Record]) -> list[str]:
        labels = read_labels(self.root / "coco")
        return [labels[question["category"]][label_key(question)] for question in self._question_rows(rows)]

    def _question_rows(self, rows: Sequence[Record]) -> list[Row]:
        """The row of the question file for each answer."""
        questions = {row["question_id"]: row for row in read_rows(self.question_path, *QUESTION_KEYS)}
        return [questions[row["question_id"]] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        """The published lines, followed by the mean F1."""
        lines = []
        for category, metrics in scores["categories"].items():
            counts = "\t".join(map(str, metrics["counts"]))
            lines += [
                f"Category: {category}, # samples: {metrics['n']}",
                f"TP\tFP\tTN\tFN\t\n{counts}",
                f"Accuracy: {metrics['accuracy']}",
                f"Precision: {metrics['precision']}",
                f"Recall: {metrics['recall']}",
                f"F1 score: {metrics['f1']}",
                f"Yes ratio: {metrics['yes_ratio']}",
                ", ".join(f"{metrics[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")),
                "=" * 36,
            ]
        other = sum(metrics["other"] for metrics in scores["categories"].values())
        lines.append(f"Mean F1 x 100: {scores['mean_f1']:.3f} (answers not starting with yes or no: {other})")
        if scores["mean_f1"] != scores["published_mean_f1"]:
            lines.append(f"With empty answers read as yes, as published: {scores['published_mean_f1']:.3f}")
        return "\n".join(lines)


def score_files(annotation_dir: Path, question_file: Path, result_file: Path) -> Scores:
    """Scores of an answers file. Raises `DataError` unless answers, questions and labels match one to one."""
    labels = read_labels(annotation_dir)
    questions = read_rows(question_file, *QUESTION_KEYS)
    answers = read_texts(result_file)
    require_same(answers, by_key(questions, question_file, "question_id"), result_file)
    keys: dict[str, list[tuple[str, str]]] = {}
    for row in questions:
        keys.setdefault(row["category"], []).append(label_key(row))
    if keys.keys() != labels.keys():
        raise DataError(
            f"The questions have the categories {', '.join(sorted(keys))}, but the labels in {annotation_dir} have "
            f"{', '.join(labels)}; not scored."
        )
    for category, asked in keys.items():
        unlabelled, extra = set(asked) - labels[category].keys(), labels[category].keys() - set(asked)
        if unlabelled or extra or len(set(asked)) < len(asked):
            raise DataError(
                f"{PREFIX}{category}{SUFFIX} does not match the questions: {len(unlabelled)} without a label, "
                f"{len(extra)} extra labels (unmatched rows); not scored. Use the label files of the commit named in "
                "docs/Evaluation.md."
            )
    return score_answers(labels, questions, answers)


def evaluate(annotation_dir: Path, question_file: Path, result_file: Path) -> str:
    """`eval_pope`: score an answers file."""
    return Pope.summary(score_files(annotation_dir, question_file, result_file))
