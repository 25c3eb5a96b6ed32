"""Error analysis of a run: kinds of answers, accuracy by group, confusion matrix, and yes-bias.

Each answer has one kind, the first that applies: `correct` (full score), `partly` (soft accuracy between 0 and 1),
`empty`, `truncated` (it reached the token limit), `refused`, `format` (the rule scores it as wrong, but it names the
reference), `unread` (the rule finds no answer in it), and `wrong`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from llava.eval.benchmarks.base import Reading, is_blank
from llava.eval.benchmarks.parsing import normalize
from llava.eval.run.answers import final_answer
from llava.eval.run.files import Record
from llava.eval.uncertainty import Metric, interval, ratio

KINDS: Final = ("correct", "partly", "wrong", "format", "unread", "refused", "truncated", "empty")
MAX_LABELS: Final = 8  # of a confusion matrix
MAX_GROUPS: Final = 12  # of a table; the others are joined
NOT_RECORDED: Final = "not recorded"
OTHERS: Final = "others"
TOTALS: Final = ("all", "total", "img_accuracy")  # groups that are not question types
_REFUSAL: Final = re.compile(
    r"\b(?:i(?:['’]m| am)? (?:sorry|unable|not able)|i can(?:['’]?t|not)|i do(?:n['’]t| not) know"
    r"|cannot (?:be )?(?:determin|answer|see)|unable to (?:determin|answer|see)|as an ai"
    r"|impossible to (?:tell|determine))|无法|抱歉",
    re.IGNORECASE,
)
_LETTER: Final = re.compile(r"\b([A-Z])\b(?=[.):\s]*$|[.):])")


@dataclass(frozen=True)
class Answer:
    """One scored answer. `score` is from 0 to 1, `groups` are the question types of the benchmark."""

    row: Record
    score: float
    reading: Reading
    reference: str
    image: str = ""
    groups: Sequence[str] = ()

    @property
    def text(self) -> str:
        return final_answer(str(self.row["text"]))

    def fact(self, name: str) -> object:
        """A recorded fact about the answer, None if the run did not record it."""
        metadata = self.row.get("metadata")
        return metadata.get(name) if isinstance(metadata, dict) else None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.score > 0:
            return "correct" if self.score >= 1 else "partly"
        if is_blank(self.text):
            return "empty"
        if self.fact("finish_reason") == "length":
            return "truncated"
        if _REFUSAL.search(self.text):
            return "refused"
        if self._names_reference():
            return "format"
        return "unread" if self.reading.is_unread else "wrong"

    def _names_reference(self) -> bool:
        """Whether the answer has the words of the reference, and not those of the reading that was scored."""
        if re.fullmatch("[A-Z]", self.reference):
            return self.reading.is_unread and set(_LETTER.findall(self.text)) == {self.reference}
        words, wanted = normalize(self.text).split(), normalize(self.reference).split()
        found = any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1))
        return bool(wanted) and found and self.reading.label not in words


@dataclass(frozen=True)
class Group:
    """Answers with a common property: their number, mean score in percent, and number of each kind.

    `low` and `high` are the 95 % interval of the mean, clustered by image; nan for a single image.
    """

    name: str
    count: int
    accuracy: float
    low: float
    high: float
    kinds: Counter[str]

    @classmethod
    def of(cls, name: str, answers: Sequence[Answer]) -> Group:
        codes: dict[str, int] = {}
        images = [codes.setdefault(each.image or f"\0{at}", len(codes)) for at, each in enumerate(answers)]
        columns = ([each.score for each in answers], np.ones(len(answers)))
        sums = np.stack([np.bincount(images, column) for column in columns], axis=1).astype(np.float64)
        metric = Metric(name, sums, ratio(100.0))
        found = interval(metric)
        low, high = (found.low, found.high) if found else (math.nan, math.nan)
        return cls(name, len(answers), metric.estimate, low, high, Counter(each.kind for each in answers))


@dataclass(frozen=True)
class YesBias:
    """Yes/no answers as signal detection: `d_prime` is the sensitivity, `criterion` the bias (below 0: towards yes).

    Rates are corrected as by Hautus (1995): half an answer is added to each cell, so that both are finite. `hits` and
    `false_alarms` are the shares of yes where the reference is yes and where it is no.
    """

    count: int
    yes_ratio: float
    true_ratio: float
    hits: float
    false_alarms: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> YesBias | None:
        """The bias of answers to yes/no questions, None unless all references are yes or no and both occur."""
        pairs = [(answer.reading.label.lower() == "yes", answer.reference.lower()) for answer in answers]
        if {reference for _, reference in pairs} != {"yes", "no"}:
            return None
        said = {label: [yes for yes, reference in pairs if reference == label] for label in ("yes", "no")}
        hits, alarms = ((sum(each) + 0.5) / (len(each) + 1) for each in (said["yes"], said["no"]))
        total = len(pairs)
        return cls(total, sum(yes for yes, _ in pairs) / total, len(said["yes"]) / total, hits, alarms)

    @property
    def d_prime(self) -> float:
        z = NormalDist().inv_cdf
        return z(self.hits) - z(self.false_alarms)

    @property
    def criterion(self) -> float:
        z = NormalDist().inv_cdf
        return -(z(self.hits) + z(self.false_alarms)) / 2


@dataclass(frozen=True)
class Analysis:
    """Error analysis of a run on a benchmark. `tables` maps the name of a property to its groups.

    `missing` lists the properties that the run did not record.
    """

    total: Group
    tables: dict[str, list[Group]]
    missing: Sequence[str]
    labels: Sequence[str]
    confusion: Sequence[Sequence[int]]
    bias: dict[str, YesBias]


def analyse(answers: Sequence[Answer]) -> Analysis:
    """The error analysis of a benchmark's answers; at least one is required."""
    counts = Counter(normalize(answer.reference) for answer in answers)
    tables = {
        "question type": _grouped(answers, _types),
        "frequency of the reference": _ranged(answers, lambda each: counts[normalize(each.reference)], (1, 5, 20, 100)),
        "image size (megapixels)": _ranged(answers, _megapixels, (0.1, 0.25, 0.5, 1.0, 2.0)),
        "image tokens": _grouped(answers, _image_tokens),
    }  # fmt: skip
    labels, confusion = confusion_matrix(answers)
    biases = {"all": YesBias.of(answers), **{
        group.name: YesBias.of([each for each in answers if group.name in _types(each)])
        for group in tables["question type"]
    }}  # fmt: skip
    return Analysis(
        Group.of("all", answers),
        {name: groups for name, groups in tables.items() if len(groups) > 1},
        [name for name, groups in tables.items() if [group.name for group in groups] == [NOT_RECORDED]],
        labels,
        confusion,
        {name: bias for name, bias in biases.items() if bias is not None},
    )


def confusion_matrix(answers: Sequence[Answer]) -> tuple[list[str], list[list[int]]]:
    """Labels, and counts of answers by reference (rows) and by the label they were read as, or none (columns).

    Empty unless the references are a closed set of at most `MAX_LABELS` labels.
    """
    labels = sorted({answer.reference for answer in answers})
    if not 1 < len(labels) <= MAX_LABELS or "" in labels:
        return [], []
    cells = Counter((answer.reference, _label(answer, labels)) for answer in answers)
    return labels, [[cells[row, column] for column in (*labels, "")] for row in labels]


def _label(answer: Answer, labels: Sequence[str]) -> str:
    """The label of the closed set that the answer was read as, empty for none of them."""
    return next((label for label in labels if label.lower() == answer.reading.label.lower()), "")


def _types(answer: Answer) -> Sequence[str]:
    """The question types of the benchmark; without any, the first two words of the question."""
    groups = [name for name in answer.groups if name not in TOTALS]
    if groups:
        return groups
    words = re.findall(r"[\w']+", str(answer.row["prompt"]).removeprefix("<image>").lower())
    return [" ".join(words[:2]) or "no words"]


def _image_tokens(answer: Answer) -> Sequence[str]:
    tokens = answer.fact("image_tokens")
    return [NOT_RECORDED if tokens is None else str(tokens)]


def _megapixels(answer: Answer) -> float | None:
    sizes = answer.fact("image_sizes")
    if not isinstance(sizes, list) or not sizes or not all(sizes):
        return None
    return float(max(width * height for width, height in sizes)) / 1e6


def _grouped(answers: Sequence[Answer], names_of: Callable[[Answer], Iterable[str]]) -> list[Group]:
    """Groups by name, the largest first; small ones beyond `MAX_GROUPS` are joined."""
    members: dict[str, list[Answer]] = {}
    for answer in answers:
        for name in names_of(answer):
            members.setdefault(name, []).append(answer)
    names = sorted(members, key=lambda name: -len(members[name]))
    kept = names if len(names) <= MAX_GROUPS else names[: MAX_GROUPS - 1]
    groups = [Group.of(name, members[name]) for name in kept]
    rest = [answer for name in names[len(kept) :] for answer in members[name]]
    return [*groups, Group.of(f"{OTHERS} ({len(names) - len(kept)})", rest)] if rest else groups


def _ranged(
    answers: Sequence[Answer], value_of: Callable[[Answer], float | None], edges: Sequence[float]
) -> list[Group]:
    """Groups by ranges of a number; upper bounds are inclusive."""
    names = [f"to {edges[0]:g}", *(f"to {edge:g}" for edge in edges[1:]), f"over {edges[-1]:g}"]
    members: dict[str, list[Answer]] = {name: [] for name in (*names, NOT_RECORDED)}
    for answer in answers:
        value = value_of(answer)
        at = None if value is None else sum(value > edge for edge in edges)
        members[NOT_RECORDED if at is None else names[at]].append(answer)
    return [Group.of(name, group) for name, group in members.items() if group]
