"""A run of one benchmark as read by reports: answers, manifest, recorded outcomes, outcomes by the current scorer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llava.errors import DataError, LlavaError
from llava.eval.benchmarks.base import Reading, Task
from llava.eval.benchmarks.outcomes import FILE, Outcome
from llava.eval.benchmarks.profiles import recorded_profile
from llava.eval.benchmarks.registry import make_task
from llava.eval.outcomes import Outcomes
from llava.eval.reporting.errors import Answer
from llava.eval.run.answers import read_complete_lines, read_results, row_error, row_key
from llava.eval.run.files import Record, Row, read_rows, write_jsonl
from llava.eval.run.manifest import read_manifest, scorer_record


@dataclass(frozen=True)
class Side:
    """A run of one benchmark. `rows` are its answers by question, in order; `failed` counts those without an answer.

    `recorded` are the outcomes that the run's scorer wrote, `rescored` those of the scorer of this version; one of them
    may be missing, the latter for the reason `unscored`.
    """

    folder: Path
    task: Task
    score: Record
    rows: Mapping[str, Record]
    failed: int = 0
    recorded: Mapping[str, Outcome] = field(default_factory=dict)
    rescored: Mapping[str, Outcome] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    readings: Mapping[str, Reading] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    unscored: str = ""

    @cached_property
    def manifest(self) -> Record:
        return read_manifest(self.folder / self.task.name / "answers.jsonl") or {}

    @property
    def identity(self) -> Record:
        found = self.manifest.get("identity", {})
        return found if isinstance(found, dict) else {}

    @property
    def prompt_profile(self) -> str:
        return recorded_profile(self.identity)

    @property
    def metric(self) -> float | None:
        """The recorded score, None if the run has none."""
        found = self.score.get("primary_metric")
        return None if found is None else float(found)

    def outcomes(self, today: bool) -> Outcomes | None:
        """The outcomes of the current scorer or the recorded ones, None if there are none."""
        found = self.rescored if today else self.recorded
        return Outcomes.of(list(found.values()), [self.images.get(key, "") for key in found]) if found else None

    @cached_property
    def answers(self) -> list[Answer]:
        """The answers with their scores; empty if they cannot be scored here."""
        groups = {key: [_plain(name) for name in outcome.groups] for key, outcome in self.rescored.items()}
        return [
            Answer(
                self.rows[key],
                outcome.score,
                self.readings[key],
                self.references[key],
                self.images.get(key, ""),
                groups[key],
            )
            for key, outcome in self.rescored.items()
        ]

    def is_unread(self, key: str) -> bool:
        return key in self.readings and self.readings[key].is_unread

    def score_of(self, key: str) -> float:
        """The outcome of the answer, by the current scorer if it could be run."""
        return (self.rescored or self.recorded)[key].score

    def facts(self, key: str) -> Record:
        """What the run recorded about an answer."""
        found = self.rows[key].get("metadata")
        return found if isinstance(found, dict) else {}


def _plain(group: str) -> str:
    """The name of a group without the path around it: `categories/random` is `random`."""
    parts = [part for part in group.split("/") if part not in ("accuracy", "score")]
    return parts[-1] if parts else group


def load_side(folder: Path, score: Record) -> Side:
    """Read a run of the task of `score` (a score.json) and score its answers again, if its data is here."""
    root = score.get("data_root")
    task = make_task(str(score["task"]), None if root is None else Path(root), score.get("split") or None)
    path = folder / task.name / "answers.jsonl"
    lines = read_complete_lines(path)
    rows = [row for row in lines if row_error(row) is None]
    saved = read_rows(path.with_name(FILE)) if path.with_name(FILE).is_file() else []
    if saved and len(saved) != len(lines):
        raise DataError(f"{path.with_name(FILE)} has {len(saved)} lines for {len(lines)} answers; score the run again.")
    images = {str(row["id"]): str(row.pop("image")) for row in saved}
    recorded = {outcome.id: outcome for outcome in (Outcome(**row) for row in saved)}
    try:
        if "judge" in score:
            raise DataError("a judge grades the answers")
        outcomes, readings, references = rescore(task, rows)
        questions = [] if images else task.read_questions(task.question_path)
    except (LlavaError, KeyError, IndexError) as error:
        order, reason = [*recorded] or [str(row_key(row)) for row in lines], Exception.__str__(error).rstrip(".")
        reason = reason if isinstance(error, LlavaError) else f"the answers do not fit the labels ({error!r})"
        return Side(folder, task, score, dict(zip(order, lines)), 0, recorded, images=images, unscored=reason)
    keys = [outcome.id for outcome in outcomes]
    if not images:
        asked = {question.key: question.images for question in questions}
        images = {key: " ".join(asked.get((row["question_id"], row["prompt"], row.get("round_id")), ()))
                  for key, row in zip(keys, rows)}  # fmt: skip
    return Side(
        folder, task, {**score, "scorer_now": scorer_record(task, path)}, dict(zip(keys, rows)),
        len(lines) - len(rows), recorded, dict(zip(keys, outcomes)), images, dict(zip(keys, readings)),
        dict(zip(keys, references)),
    )  # fmt: skip


def rescore(task: Task, rows: Sequence[Row]) -> tuple[Sequence[Outcome], Sequence[Reading], Sequence[str]]:
    """Outcomes, readings and references of answers by the scorer of this version, in their order.

    Raises `DataError` if labels are missing, or if only a server can score.
    """
    with tempfile.TemporaryDirectory(prefix="llava-rescore-") as folder:  # scorers write uploads beside the answers
        path = Path(folder) / "answers.jsonl"
        write_jsonl(path, rows)
        scored = read_results(path, "prompt")
        outcomes = task.score_rows(scored, path).get("outcomes")
    if not outcomes:
        raise DataError("only a server can score the answers")
    return outcomes, task.readings(scored), task.references(scored)
