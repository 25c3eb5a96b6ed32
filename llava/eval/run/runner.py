"""Run a model over the questions of a benchmark: settings, the model interface, and resumable runs."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from llava.engine import Engine, SamplingParams, Statistics
from llava.eval.run.answers import AnswersWriter, answer_row
from llava.eval.run.images import ImageFolder, ImageSource
from llava.eval.run.local_model import LocalModel
from llava.eval.run.manifest import check_resume, questions_fingerprint, to_json, write_manifest
from llava.eval.run.questions import Question, QuestionId, get_chunk
from llava.eval.run.shards import earlier_rows, keys_digest
from llava.provenance import file_digest

WINDOW = 1024  # questions reordered at a time to bring questions about the same image together

# position, text, error, and facts to record: inputs, thinking, why the answer ended
Answer = tuple[int, str, str | None] | tuple[int, str, str | None, Mapping[str, object]]


@dataclass(frozen=True)
class RunSettings:
    """Settings of one run over one benchmark.

    `template` is a registered conversation template. `params` apply to every question, except for the seed. `chunk`
    (k, n) selects chunk k of n. `images` replaces `image_folder`. The manifest records the hashes of `files` and the
    `quantization` of the weights. With `follow_up`, each question is asked a second time with the first answer and this
    text appended to the prompt (`--answer-prompter` of ScienceQA). `prompt_profile` names the prompts if they are not
    LLaVA's.
    """

    model_path: str
    model_id: str
    template: str
    params: SamplingParams
    image_folder: Path = Path()
    num_workers: int = 4
    resume: bool = False
    overwrite: bool = False
    chunk: tuple[int, int] = (0, 1)
    images: ImageSource | None = None
    files: tuple[Path, ...] = ()
    quantization: str | None = None
    follow_up: str | None = None
    prompt_profile: str | None = None

    @property
    def source(self) -> ImageSource:
        return self.images or ImageFolder(self.image_folder)

    def is_first(self, position: int) -> bool:
        """Whether a position of this chunk is the first question of the benchmark."""
        return position == 0 and self.chunk[0] == 0

    def seed_for(self, question: Question) -> int | None:
        """Sampling seed of a question, independent of batch and shard; None for greedy decoding or without a seed."""
        if self.params.temperature == 0 or self.params.seed is None:
            return None
        rounds = () if question.round_id is None else (question.round_id,)
        key = "\n".join(map(str, (question.question_id, question.prompt, *rounds)))
        return self.params.seed + zlib.crc32(key.encode())


class EvalModel(Protocol):
    """A model in this process (`LocalModel`) or on a server (`RemoteModel`)."""

    batch_size: int

    def identity(self, settings: RunSettings) -> dict[str, object]:
        """What determines the answers besides questions and decoding; runs may share answers only if it is equal."""

    def answer(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Answer]:
        """Answer the questions at the positions of `order` and yield the answers as they finish."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run: questions asked, answers reused from earlier runs, failed questions with errors, seconds.

    `statistics` are those of the engine during the run, None for a server.
    """

    asked: int
    reused: int
    failures: tuple[tuple[QuestionId, str], ...]
    seconds: float
    statistics: Statistics | None = None


def run(model: Engine | EvalModel, questions: Sequence[Question], answers: Path, settings: RunSettings) -> Outcome:
    """Answer the questions of `settings.chunk` and write the answers file and its manifest.

    `questions` are those of all chunks. Answers of earlier runs with equal settings are reused, whatever their chunks.
    Raises `ConfigError` if `answers` belongs to other settings.
    """
    eval_model = LocalModel(model) if isinstance(model, Engine) else model
    engine = eval_model.engine if isinstance(eval_model, LocalModel) else None
    before = None if engine is None else engine.statistics()
    identity = run_identity(eval_model, questions, settings)
    check_resume(answers, identity, resume=settings.resume, overwrite=settings.overwrite)
    known = {} if settings.overwrite else earlier_rows(answers, to_json(identity), questions)
    index, count = settings.chunk
    chunk = get_chunk(questions, count, index)
    writer = AnswersWriter(answers, chunk, known)
    facts = {
        "batch_size": eval_model.batch_size, "questions": len(chunk), "total": len(questions),
        "keys": keys_digest(question.key for question in chunk),
        "files": {path.name: file_digest(path) for path in settings.files},
    }  # fmt: skip
    write_manifest(answers, identity, status="running", **facts)
    started = time.monotonic()
    todo = [position for position in range(len(chunk)) if position not in writer.finished]
    failures: list[tuple[QuestionId, str]] = []
    complete = False
    try:
        with tqdm(total=len(chunk), initial=len(writer.finished), unit="question", desc=answers.name) as bar:
            for answer in eval_model.answer(chunk, group_by_images(chunk, todo), settings):
                position, text, error = answer[:3]
                if error is not None:
                    failures.append((chunk[position].question_id, error))
                row = answer_row(settings.model_id, chunk[position], text, error)
                if len(answer) == 4:
                    row = {**row, "metadata": {**row["metadata"], **answer[3]}}
                writer.write(position, row)
                bar.update()
        complete = True
    finally:
        writer.close(complete=complete)
    statistics = None if engine is None or before is None else engine.statistics().since(before)
    outcome = Outcome(len(todo), len(writer.finished), tuple(failures), time.monotonic() - started, statistics)
    write_manifest(
        answers, identity, status="failed" if failures else "complete", failed=len(failures), asked=outcome.asked,
        seconds=round(outcome.seconds, 3), engine=outcome.statistics, **facts,
    )  # fmt: skip
    return outcome


def run_identity(model: EvalModel, questions: Sequence[Question], settings: RunSettings) -> dict[str, object]:
    """Everything that determines the answers. Runs with equal identities may share an answers file."""
    return {
        "model_id": settings.model_id,
        "questions": questions_fingerprint(questions),
        "chunk": settings.chunk,
        "decoding": settings.params.as_dict(),
        **({} if settings.prompt_profile is None else {"prompt_profile": settings.prompt_profile}),
        **model.identity(settings),
    }


def group_by_images(questions: Sequence[Question], positions: Sequence[int], window: int = WINDOW) -> Iterator[int]:
    """Reorder `positions` within windows so that questions about the same images are consecutive."""
    for start in range(0, len(positions), window):
        part = positions[start : start + window]
        first: dict[tuple[str, ...], int] = {}
        for position in part:
            first.setdefault(questions[position].images, position)
        yield from sorted(part, key=lambda position: (first[questions[position].images], position))


def report(outcome: Outcome, answers: Path, log: Callable[[str], None]) -> int:
    """Log a summary of a run and return the exit status: 1 if a question failed, else 0."""
    rate = outcome.asked / outcome.seconds if outcome.seconds else 0.0
    log(f"{outcome.asked} answered in {outcome.seconds:.1f} s ({rate:.1f}/s), {outcome.reused} reused: {answers}")
    if outcome.statistics is not None:
        log(outcome.statistics.summary())
    for question_id, error in outcome.failures[:10]:
        log(f"failed: question {question_id}: {error}")
    if outcome.failures:
        log(f"{len(outcome.failures)} question(s) failed and are marked in the answers file; run again to retry them.")
    return 1 if outcome.failures else 0
