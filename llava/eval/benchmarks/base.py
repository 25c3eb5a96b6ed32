"""The benchmark interface: question files, images, scoring and tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.outcomes import FILE, Outcome, write_outcomes
from llava.eval.run.answers import complete_answers
from llava.eval.run.files import Record, Row
from llava.eval.run.images import ImageFolder, ImageSource
from llava.eval.run.questions import Question, read_questions, subsample

if TYPE_CHECKING:
    from llava.eval.outcomes import Outcomes
    from llava.eval.uncertainty import Metric

Scores = dict[str, Any]  # content of score.json
EVAL_DATA: Final = Path("playground/data/eval")
EVAL_ZIP: Final = "eval.zip, linked by https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"
COCO: Final = "http://images.cocodataset.org/zips/"


def count_unread(unread: Iterable[bool]) -> Scores:
    """The number of answers, and of those in which the benchmark's rule finds no answer, as fields of the scores."""
    flags = list(unread)
    return {"answers": len(flags), "unread": sum(flags)}


def is_blank(text: str) -> bool:
    """Whether an answer is empty. No benchmark counts it as right, whatever its rule makes of it."""
    return not text.strip()


def unread_line(scores: Scores) -> str:
    """The line about unread answers that follows every score."""
    missing = f", {scores['missing']} of them missing" if scores.get("missing") else ""
    return f"Unread answers: {scores['unread']} of {scores['answers']}{missing}"


def interval_lines(scores: Scores) -> list[str]:
    """The confidence interval of each metric; no lines if the scores have none."""
    found = {name: each for name, each in scores.get("intervals", {}).items() if each is not None}
    width = max(map(len, found), default=0)
    lines = [
        f"  {name:<{width}}  {each['value']:>8.5g}  {each['low']:.5g} to {each['high']:.5g}"
        for name, each in found.items()
    ]
    return ["95 % confidence intervals, clustered by image:", *lines] if lines else []


@dataclass(frozen=True)
class Reading:
    """What the parsing rule of a benchmark reads in an answer, and whether the answer counts as unread."""

    label: str
    is_unread: bool


@dataclass(frozen=True)
class RequiredFile:
    """A file or folder of a benchmark and its source."""

    path: Path
    source: str

    @property
    def missing(self) -> bool:
        """Whether the path does not exist or is an empty folder."""
        return not self.path.exists() or (self.path.is_dir() and next(self.path.iterdir(), None) is None)


@dataclass(frozen=True)
class Layout:
    """Files of one split, relative to the benchmark's folder.

    `questions` has `rows` questions and comes from `source`. `images` is a folder from `image_source`, empty if the
    images are elsewhere. `labels` maps every other file to its source.
    """

    questions: str
    images: str
    rows: int
    image_source: str
    labels: Mapping[str, str] = field(default_factory=dict)
    source: str = EVAL_ZIP


class Task(ABC):
    """One benchmark and split. Register a subclass in `llava.eval.benchmarks.registry`.

    Args:
        data_root: folder with the files of the layout (default: `playground/data/eval/FOLDER`).
        split: a key of `layouts`, whose first one has published scores.

    `column` is the name in the published table (`llava.eval.reporting.data`), `metric` the key of the published score.
    `overall` names the accuracy over all answers in the scores. `supports_limit` is false if scores depend on groups of
    questions.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    layouts: ClassVar[Mapping[str, Layout]]
    column: ClassVar[str | None] = None
    metric: ClassVar[str] = "accuracy"
    overall: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 128
    supports_limit: ClassVar[bool] = True

    def __init__(self, data_root: Path | None, split: str) -> None:
        self.data_root = data_root
        self.split = split

    @classmethod
    def default_root(cls, eval_data: Path) -> Path | None:
        """The task's folder below the folder of all benchmarks, None if its data is elsewhere."""
        return eval_data / cls.folder

    @property
    def layout(self) -> Layout:
        return self.layouts[self.split]

    @property
    def root(self) -> Path:
        return self.data_root or EVAL_DATA / self.folder

    @property
    def question_path(self) -> Path:
        return self.root / self.layout.questions

    @property
    def image_folder(self) -> Path:
        return self.root / self.layout.images

    @property
    def images(self) -> ImageSource:
        return ImageFolder(self.image_folder)

    @property
    def published_rows(self) -> int:
        """The official number of questions."""
        return self.layout.rows

    def required_files(self) -> Sequence[RequiredFile]:
        """Every file and folder of the split."""
        layout = self.layout
        labels = [RequiredFile(self.root / name, source) for name, source in layout.labels.items()]
        images = [RequiredFile(self.image_folder, layout.image_source)] if layout.images else []
        return [RequiredFile(self.question_path, layout.source), *labels, *images]

    def label_files(self) -> tuple[Path, ...]:
        """The files of questions and labels that are present."""
        return tuple(file.path for file in self.required_files() if file.path.is_file())

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        """The questions in official order, or `limit` evenly spaced ones.

        Raises `DataError` naming a missing file and its source, `ConfigError` if the task does not support a limit.
        """
        if limit is not None and not self.supports_limit:
            raise ConfigError(f"{self.name} is scored over groups of questions and does not support --limit.")
        for file in self.required_files():
            if file.missing:
                raise DataError(
                    f"{self.name} requires {file.path}, which is missing; its source is {file.source}. "
                    f"List all required files with: llava eval prepare {self.name}"
                )
        return subsample(self.read_questions(self.question_path), limit)

    def read_questions(self, path: Path) -> Sequence[Question]:
        """All questions of the file."""
        return read_questions(path)

    def score(self, answers: Path, limit: int | None = None) -> Scores:
        """Scores of a complete answers file. Raises `DataError` if an answer is missing or failed.

        Answers that a server has to score are written to the file named under `upload`. `unread` counts the empty
        answers, unless `score_rows` counts those that its rule cannot read (`count_unread`). If `score_rows` returns
        `outcomes`, they are written beside the answers, and `intervals` has the 95 % interval of each metric.
        """
        questions = self.questions(limit)
        rows = complete_answers(answers, questions)
        unread = count_unread(is_blank(row["text"]) for row in rows)
        scores = {"task": self.name, "split": self.split, **unread, **self.score_rows(rows, answers)}
        outcomes: list[Outcome] = scores.pop("outcomes", [])
        if not outcomes:
            answers.with_name(FILE).unlink(missing_ok=True)
            return scores
        from llava.eval.outcomes import Outcomes  # needs numpy
        from llava.eval.uncertainty import interval

        images = [" ".join(question.images) for question in questions]
        write_outcomes(answers.with_name(FILE), outcomes, images)
        intervals = {each.name: interval(each) for each in self.metrics(Outcomes.of(outcomes, images))}
        return {**scores, "intervals": {name: found and found.record() for name, found in intervals.items()}}

    @abstractmethod
    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        """Scores of the complete answers in `path`; with `--limit`, these are answers to a part of the questions.

        `outcomes` may list the `Outcome` of each row.
        """

    @classmethod
    def metrics(cls, outcomes: Outcomes) -> list[Metric]:
        """Metrics with an interval, named by their paths in the scores: means of all scores, of groups, of values."""
        groups = [outcomes.mean(name, group=name) for name in outcomes.groups]
        values = [outcomes.mean(name, column) for name, column in outcomes.values.items()]
        return [outcomes.mean(cls.overall), *groups, *values]

    @classmethod
    def scored_units(cls, outcomes: Outcomes) -> Outcomes:
        """Outcomes of the units that are scored: single answers, unless the benchmark scores several together."""
        return outcomes

    @staticmethod
    @abstractmethod
    def table(scores: Scores) -> str:
        """The scores as printed, followed by `unread_line`."""

    @classmethod
    def summary(cls, scores: Scores) -> str:
        """The table, the number of unread answers, and the confidence intervals."""
        return "\n".join((cls.table(scores).rstrip(), unread_line(scores), *interval_lines(scores)))

    def primary_metric(self, scores: Scores) -> float | None:
        """The published metric, None if only a server can compute it."""
        found = scores.get(self.metric)
        return None if found is None else float(found)

    def readings(self, rows: Sequence[Row]) -> list[Reading]:
        """The reading of each answer; by default its text, unread if empty."""
        return [Reading(str(row["text"]).strip().rstrip(".").lower(), is_blank(row["text"])) for row in rows]

    def references(self, rows: Sequence[Record]) -> list[str]:
        """The reference answer to the question of each record, empty where it is unknown."""
        return [""] * len(rows)
