"""Asking a model all questions of a benchmark, or a part of them; answers are written in order, runs can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.engine import Engine
from llava.eval.run.answers import AnswersWriter, MakeRow, answer_row
from llava.eval.run.local_model import LocalModel
from llava.eval.run.manifest import check_resume, file_digest, plain, questions_fingerprint, write_manifest
from llava.eval.run.questions import Question, get_chunk
from llava.eval.run.settings import Answerer, RunSettings
from llava.eval.run.shards import earlier_rows, keys_digest

WINDOW = 1024  # questions reordered at a time, so that those of one picture meet in a batch


@dataclass(frozen=True)
class Outcome:
    """What a run did: answers asked now, found from before, failed ones with their reasons, and its time."""

    asked: int
    found: int
    failures: tuple[tuple[Any, str], ...]
    seconds: float


def run(
    model: Engine | Answerer,
    questions: Sequence[Question],
    answers: Path,
    settings: RunSettings,
    make_row: MakeRow | None = None,
) -> Outcome:
    """Ask what is not answered yet of `settings.chunk`, writing `answers` (see `llava.eval.run.answers`) and its
    manifest.

    `questions` are those of all chunks. What earlier runs answered in other chunks, or in one, is taken over.
    """
    answerer = LocalModel(model) if isinstance(model, Engine) else model
    identity = run_identity(answerer, questions, settings)
    check_resume(answers, identity, resume=settings.resume, overwrite=settings.overwrite)
    known = {} if settings.overwrite else earlier_rows(answers, plain(identity), questions)
    index, count = settings.chunk
    mine = get_chunk(questions, count, index)
    writer = AnswersWriter(answers, mine, known)
    facts = {
        "batch_size": answerer.batch_size, "questions": len(mine), "total": len(questions),
        "keys": keys_digest(question.key for question in mine),
        "files": {path.name: file_digest(path) for path in settings.files},
    }  # fmt: skip
    write_manifest(answers, identity, status="running", **facts)
    started = time.monotonic()
    todo = [position for position in range(len(mine)) if position not in writer.finished]
    failures: list[tuple[Any, str]] = []
    complete = False
    make_row = make_row or answer_row(settings.model_id)
    try:
        with tqdm(total=len(mine), initial=len(writer.finished), unit="question", desc=answers.name) as bar:
            for position, text, error in answerer.ask(mine, work_order(mine, todo), settings):
                if error is not None:
                    failures.append((mine[position].question_id, error))
                writer.put(position, make_row(mine[position], text, error))
                bar.update()
        complete = True
    finally:
        writer.close(complete=complete)
    outcome = Outcome(len(todo), len(writer.finished), tuple(failures), time.monotonic() - started)
    write_manifest(
        answers, identity, status="failed" if failures else "complete", failed=len(failures), asked=outcome.asked,
        seconds=round(outcome.seconds, 3), **facts,
    )  # fmt: skip
    return outcome


def run_identity(answerer: Answerer, questions: Sequence[Question], settings: RunSettings) -> dict[str, Any]:
    """Everything that decides the answers (EVAL-1); two runs with equal identities may share an answers file."""
    return {
        "model_id": settings.model_id,
        "questions": questions_fingerprint(questions),
        "chunk": settings.chunk,
        "decoding": settings.params,
        **answerer.identity(settings),
    }


def work_order(questions: Sequence[Question], positions: Sequence[int], window: int = WINDOW) -> Iterator[int]:
    """`positions` reordered inside windows, so that questions of one picture are neighbours."""
    for start in range(0, len(positions), window):
        part = positions[start : start + window]
        first: dict[tuple[str, ...], int] = {}
        for position in part:
            first.setdefault(questions[position].images, position)
        yield from sorted(part, key=lambda position: (first[questions[position].images], position))


def report(outcome: Outcome, answers: Path, say: Callable[[str], None]) -> int:
    """Tell how a run went; the exit status, 1 when a question could not be answered."""
    rate = outcome.asked / outcome.seconds if outcome.seconds else 0.0
    say(f"{outcome.asked} answered in {outcome.seconds:.1f} s ({rate:.1f}/s), {outcome.found} from before: {answers}")
    for question_id, error in outcome.failures[:10]:
        say(f"failed: question {question_id}: {error}")
    if outcome.failures:
        say(f"{len(outcome.failures)} question(s) failed and are marked in the answers; run again to retry them.")
    return 1 if outcome.failures else 0
