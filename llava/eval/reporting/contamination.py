"""Report of near-duplicates between training data and benchmarks: JSON, terminal summary, and HTML page."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final

from PIL import Image

from llava.data.question_overlap import words_of
from llava.errors import shorten

NAMED: Final = 10  # pairs and unreadable images that the summary lists
THUMBNAIL: Final = 288  # pixels of the longer side
SAME_IMAGE, RARE_TEXT = "same image", "rare text"
COLUMNS: Final = (
    "benchmark", "images", "near-duplicates", "share", "unreadable", "questions", "with their image", "rare text",
    "common text, not reported",
)  # fmt: skip
STYLE: Final = """
.cards.pairs { grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1px; background: var(--line); }
.pair figure { margin: 0; background: var(--frame); min-width: 0; }
.pair figcaption { font-size: 12px; color: var(--soft); padding: 6px 12px; background: var(--page); overflow: hidden;
                   white-space: nowrap; text-overflow: ellipsis; }
.card .pair .frame img { min-height: 0; height: 200px; width: 100%; }
.pair p { margin: 0; padding: 10px 12px; color: var(--ink); font-size: 14px; overflow-wrap: anywhere;
          max-height: 12em; overflow-y: auto; white-space: pre-wrap; }
.score { display: flex; align-items: center; gap: 10px; margin: 0 0 10px; font-variant-numeric: tabular-nums; }
.score b { font-size: 17px; } .score progress { flex: 1; height: 6px; min-width: 0; accent-color: var(--off); }
.tag { font-size: 12px; border: 1px solid var(--line); border-radius: 10px; padding: 1px 9px; color: var(--soft); }
.pair s { color: var(--soft); text-decoration: none; }
li { margin: 0 0 6px 20px; font-size: 14px; overflow-wrap: anywhere; }
"""


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


def data_url(image: Image.Image) -> str:
    """A thumbnail as JPEG in a data URL."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_page(report: Report, limit: int, thumbnails: Callable[[ImagePair], tuple[str, str]]) -> str:
    """Self-contained page with the first `limit` pairs of images and of questions; all texts are escaped."""
    names = ", ".join(each.name for each in report.benchmarks)
    head = "".join(f'<th class="{"" if index == 0 else "number"}">{name}</th>' for index, name in enumerate(COLUMNS))
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"number" if index else ""}">{escape(cell)}</td>' for index, cell in enumerate(each.cells())
        )
        + "</tr>"
        for each in report.benchmarks
    )
    parts = [
        f"<h1>Contamination</h1><p>{escape(report.data)}: {report.records:,} records with {report.images:,} images, "
        f'compared with {escape(names)}.</p><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    ]
    if notes := report.notes():
        parts.append(
            "<h2>Not compared</h2>"
            + "".join(f"<{(tag := 'li' if note[0] == ' ' else 'p')}>{escape(note.strip())}</{tag}>" for note in notes)
        )
    cards = "".join(_image_card(pair, *thumbnails(pair)) for pair in report.image_pairs[:limit])
    parts.append(_section("Images", len(report.image_pairs), limit, "most similar first", cards))
    cards = "".join(map(_question_card, report.question_pairs[:limit]))
    parts.append(_section("Questions", len(report.question_pairs), limit, "those with their image first", cards))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + STYLE
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Contamination: {escape(names)}</title><style>{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _section(title: str, count: int, limit: int, order: str, cards: str) -> str:
    text = f"{count:,} pair(s), {order}." if count else "None found."
    if count > limit:
        text += f" The first {limit:,} are shown; {count - limit:,} more are left out (--max-pairs, --json)."
    return f'<h2>{title}</h2><p>{text}</p><div class="cards pairs">{cards}</div>'


def _image_card(pair: ImagePair, training: str, benchmark: str) -> str:
    frames = [f'<div class="frame"><img alt="" src="{url}"></div>' for url in (training, benchmark)]
    words = {
        "training": [pair.training_image],
        "records": pair.records,
        "benchmark": [pair.benchmark_image],
        "questions": pair.questions,
    }
    return _card(pair.benchmark, frames, pair.similarity, "similarity", words)


def _question_card(pair: QuestionPair) -> str:
    texts = [f"<p>{_compared(*pair)}</p>" for pair in ((pair.text, pair.question), (pair.question, pair.text))]
    return _card(
        pair.benchmark, texts, pair.contained, pair.reason, {"record": [pair.record], "question": [pair.question_id]}
    )


def _card(benchmark: str, sides: Sequence[str], value: float, label: str, rows: Mapping[str, Sequence[str]]) -> str:
    """Training and benchmark side by side, above a score and `rows` of paths and ids, shortened to two parts."""
    figures = "".join(
        f"<figure><figcaption>{name}</figcaption>{side}</figure>"
        for name, side in zip(("training", escape(_short(benchmark))), sides)
    )
    pairs = "".join(
        f'<dt>{name}</dt><dd title="{escape(", ".join(texts))}">{escape(", ".join(map(_short, texts)))}</dd>'
        for name, texts in rows.items()
        if texts
    )
    score = f'<b>{value:.1%}</b><progress value="{value:.3f}"></progress><span class="tag">{label}</span>'
    words = f'<div class="words"><div class="score">{score}</div><dl>{pairs}</dl></div>'
    return f'<div class="card"><div class="pair">{figures}</div>{words}</div>'


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _compared(text: str, other: str) -> str:
    """Escaped text in which the words missing from `other` are faint."""
    shared = set(words_of(other))
    return " ".join(
        escape(word) if shared.issuperset(words_of(word)) else f"<s>{escape(word)}</s>" for word in text.split()
    )
