"""Report of near-duplicates between training data and benchmarks: JSON, terminal summary, and HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llava.data.question_overlap import words_of
from llava.errors import shorten
from llava.eval.reporting.rendering import render

NAMED: Final = 10  # pairs and unreadable images that the summary lists
SAME_IMAGE, RARE_TEXT = "same image", "rare text"
COLUMNS: Final = (
    "benchmark", "images", "near-duplicates", "share", "unreadable", "questions", "with their image", "rare text",
    "common text, not reported",
)  # fmt: skip


@dataclass(frozen=True)
class ImagePair:
    """Near-duplicates, the records that have the training image, and the questions about the benchmark's image.

    `numbers` are the indices of the training image, the benchmark, and its image.
    """

    benchmark: str
    benchmark_image: str
    training_image: str
    similarity: float
    records: list[str]
    questions: list[str]
    numbers: tuple[int, tuple[int, int]]


@dataclass(frozen=True)
class QuestionPair:
    """A question in a record, with the fraction of its trigrams there and the reason why it is reported."""

    benchmark: str
    question_id: str
    question: str
    record: str
    text: str
    contained: float
    reason: str


@dataclass
class BenchmarkReport:
    """Counts of a benchmark; `common_questions` are in training records, but neither with their image nor rare."""

    name: str
    images: int
    questions: int
    unreadable: dict[str, str] = field(default_factory=dict)
    uniform: int = 0
    images_found: int = 0
    questions_with_image: int = 0
    rare_questions: int = 0
    common_questions: int = 0

    def cells(self) -> list[str]:
        """Cells of `COLUMNS`."""
        share = f"{self.images_found / self.images:.1%}" if self.images else "–"
        counts = (self.questions, self.questions_with_image, self.rare_questions, self.common_questions)
        return [
            self.name, f"{self.images:,}", f"{self.images_found:,}", share, f"{len(self.unreadable):,}",
            *(f"{count:,}" for count in counts),
        ]  # fmt: skip


@dataclass
class Report:
    """Result of a check. `skipped_candidates` exceeded the number of comparisons per training image."""

    data: str
    records: int
    images: int
    seconds: float
    bad_records: dict[str, str]
    unreadable: dict[str, str]
    uniform: int
    skipped_candidates: int
    benchmarks: list[BenchmarkReport]
    image_pairs: list[ImagePair]
    question_pairs: list[QuestionPair]

    @property
    def status(self) -> int:
        """Exit status: 1 if something was found, 3 if nothing was in an incomplete check, 0 if nothing was."""
        if self.image_pairs or self.question_pairs:
            return 1
        return 3 if self.unreadable or self.bad_records or any(each.unreadable for each in self.benchmarks) else 0

    def to_json(self) -> dict[str, Any]:
        """All fields, except for the numbers of images."""
        fields = dataclasses.asdict(self)
        for pair in fields["image_pairs"]:
            del pair["numbers"]
        return fields

    def notes(self) -> list[str]:
        """What the check did not compare, one line each."""
        lines = []
        groups = [("training", self.unreadable), *((each.name, each.unreadable) for each in self.benchmarks)]
        for name, unreadable in groups:
            if unreadable:
                lines.append(f"{len(unreadable):,} {name} image(s) could not be read and were not compared:")
                lines += _first([shorten(text, 300) for text in unreadable.values()])
        if self.bad_records:
            lines.append(f"{len(self.bad_records):,} record(s) are malformed and were not compared:")
            lines += _first([f"{place}: {text}" for place, text in self.bad_records.items()])
        uniform = self.uniform + sum(each.uniform for each in self.benchmarks)
        if uniform:
            lines.append(f"{uniform:,} image(s) of one color were not compared.")
        if self.skipped_candidates:
            lines.append(f"{self.skipped_candidates:,} candidates beyond the limit per image were not compared.")
        return lines


def _first(lines: Sequence[str]) -> list[str]:
    rest = [f"… and {len(lines) - NAMED:,} more (--json lists them)"] if len(lines) > NAMED else []
    return [f"  {line}" for line in (*lines[:NAMED], *rest)]


def summary(report: Report) -> str:
    """The report for the terminal."""
    rate = (report.images + sum(each.images for each in report.benchmarks)) / max(report.seconds, 1e-9)
    lines = [
        f"{report.data}: {report.records:,} records with {report.images:,} images, checked in {report.seconds:.1f} s "
        f"({rate:,.0f} images/s)."
    ]
    for each in report.benchmarks:
        _, total, found, share, _, asked, same, rare, common = each.cells()
        text = f"{each.name}: {found} of {total} images have near-duplicates ({share})"
        if each.questions:
            text += f"; of {asked} questions, {same} occur with their image and {rare} have rare text that occurs"
            text += f" ({common} more share common text and are not reported)"
        lines.append(f"{text}.")
    images = [
        f"{pair.similarity:.3f}  {pair.training_image} ({_records(pair.records)}) = {pair.benchmark_image}"
        for pair in report.image_pairs
    ]
    questions = [
        f"{pair.reason}: {pair.record} has {pair.benchmark} question {pair.question_id}: {shorten(pair.question, 80)}"
        for pair in report.question_pairs
    ]
    for title, rows in (("Images", images), ("Questions", questions)):
        lines += [f"{title}:", *_first(rows)] if rows else []
    return "\n".join([*lines, *report.notes()])


def _records(places: Sequence[str]) -> str:
    return places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")


def render_page(report: Report, limit: int, thumbnails: Callable[[ImagePair], tuple[str, str]]) -> str:
    """Self-contained page with the first `limit` pairs of images and of questions."""
    return render(
        "contamination.html",
        report=report,
        limit=limit,
        thumbnails=thumbnails,
        names=", ".join(each.name for each in report.benchmarks),
        columns=COLUMNS,
        rows=[each.cells() for each in report.benchmarks],
        compared_words=_compared_words,
    )


def _compared_words(text: str, other: str) -> list[tuple[str, bool]]:
    """The words of a text, and whether `other` has them too."""
    shared = set(words_of(other))
    return [(word, shared.issuperset(words_of(word))) for word in text.split()]
