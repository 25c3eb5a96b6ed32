"""Asking a model all questions of a benchmark: one engine, pictures opened ahead of it, answers written in order."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from llava.conversation import get_template, stop_strings
from llava.data.images import open_image
from llava.engine import Engine, Handle, Request, SamplingParams
from llava.engine.prompt import render_question
from llava.errors import LlavaError, RequestError
from llava.eval.answers import AnswersWriter, MakeRow, answer_row
from llava.eval.manifest import check_resume, checkpoint_fingerprint, questions_fingerprint, write_manifest
from llava.eval.questions import Question

WINDOW = 1024  # questions reordered at a time, so that those of one picture meet in a batch


@dataclass(frozen=True)
class RunSettings:
    """How a run asks. `template` is a registered name; `params` apply to every question, its seed aside."""

    model_path: str
    model_id: str
    template: str
    params: SamplingParams
    image_folder: Path = Path()
    num_workers: int = 4
    resume: bool = False
    overwrite: bool = False
    chunk: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Outcome:
    """What a run did: answers asked now, found from before, failed ones with their reasons, and its time."""

    asked: int
    found: int
    failures: tuple[tuple[Any, str], ...]
    seconds: float


def run(
    engine: Engine,
    questions: Sequence[Question],
    answers: Path,
    settings: RunSettings,
    make_row: MakeRow | None = None,
) -> Outcome:
    """Ask everything not answered yet, writing `answers` and its manifest; see `llava.eval.answers`."""
    identity = run_identity(engine, questions, settings)
    check_resume(answers, identity, resume=settings.resume, overwrite=settings.overwrite)
    writer = AnswersWriter(answers, questions)
    facts = {"batch_size": engine.max_batch_size, "questions": len(questions)}
    write_manifest(answers, identity, status="running", **facts)
    started = time.monotonic()
    todo = [position for position in range(len(questions)) if position not in writer.finished]
    failures: list[tuple[Any, str]] = []
    complete = False
    make_row = make_row or answer_row(settings.model_id)
    try:
        with tqdm(total=len(questions), initial=len(writer.finished), unit="question", desc=answers.name) as bar:
            for position, text, error in ask(engine, questions, work_order(questions, todo), settings):
                question = questions[position]
                if error is not None:
                    failures.append((question.question_id, error))
                writer.put(position, make_row(question, text, error))
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


def run_identity(engine: Engine, questions: Sequence[Question], settings: RunSettings) -> dict[str, Any]:
    """Everything that decides the answers (EVAL-1); two runs with equal identities may share an answers file."""
    config = engine.model.config
    example = render_question(get_template(settings.template), "{question}", 1, config)
    return {
        "model_id": settings.model_id,
        "checkpoint": checkpoint_fingerprint(settings.model_path),
        "questions": questions_fingerprint(questions),
        "chunk": settings.chunk,
        "template": {"name": settings.template, "text": example},
        "decoding": settings.params,
        "image_aspect_ratio": engine.image_aspect_ratio,
        "dtype": str(engine.lm.spec.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "device": engine.lm.spec.device.type,
    }


def work_order(questions: Sequence[Question], positions: Sequence[int], window: int = WINDOW) -> Iterator[int]:
    """`positions` reordered inside windows, so that questions of one picture are neighbours."""
    for start in range(0, len(positions), window):
        part = positions[start : start + window]
        first: dict[tuple[str, ...], int] = {}
        for position in part:
            first.setdefault(questions[position].images, position)
        yield from sorted(part, key=lambda position: (first[questions[position].images], position))


def ask(
    engine: Engine, questions: Sequence[Question], order: Iterable[int], settings: RunSettings
) -> Iterator[tuple[int, str, str | None]]:
    """Yield (position, answer, error or None) as questions finish, keeping the engine's batch full."""
    template = get_template(settings.template)
    stop = (*settings.params.stop, *stop_strings(template))
    active: dict[Handle, int] = {}
    pictures = prefetch(questions, order, settings, ahead=2 * engine.max_batch_size)
    more = True
    while more or active:
        while more and len(active) < 2 * engine.max_batch_size:
            item = next(pictures, None)
            if item is None:
                more = False
                break
            position, images = item
            try:
                if isinstance(images, LlavaError):
                    raise images
                question = questions[position]
                prompt = render_question(template, question.text or question.prompt, len(images), engine.model.config)
                params = dataclasses.replace(settings.params, stop=stop, seed=question_seed(settings, question))
                active[engine.submit(Request(prompt, images, params))] = position
            except (RequestError, LlavaError) as error:
                yield position, "", str(error)
        engine.step()
        for handle in [handle for handle in active if handle.done]:
            yield active.pop(handle), handle.result().text, None


def question_seed(settings: RunSettings, question: Question) -> int | None:
    """A seed of the question's own, so that a sampled answer depends neither on the batch nor on the shard."""
    if settings.params.temperature == 0 or settings.params.seed is None:
        return None
    return settings.params.seed + zlib.crc32(f"{question.question_id}\n{question.prompt}".encode())


Loaded = list[Image.Image] | LlavaError


def prefetch(
    questions: Sequence[Question], order: Iterable[int], settings: RunSettings, ahead: int
) -> Iterator[tuple[int, Loaded]]:
    """Open pictures in threads ahead of the model; neighbours with equal pictures share them."""

    def load(names: tuple[str, ...]) -> Loaded:
        try:
            return [open_image(settings.image_folder / name) for name in names]
        except LlavaError as error:
            return error

    with ThreadPoolExecutor(max(1, settings.num_workers)) as pool:
        queue: deque[tuple[int, tuple[str, ...], Future[Loaded]]] = deque()
        for position in order:
            names = questions[position].images
            shared = queue[-1][2] if queue and queue[-1][1] == names else pool.submit(load, names)
            queue.append((position, names, shared))
            if len(queue) > ahead:
                at, _, future = queue.popleft()
                yield at, future.result()
        while queue:
            at, _, future = queue.popleft()
            yield at, future.result()


def report(outcome: Outcome, answers: Path, say: Callable[[str], None]) -> int:
    """Tell how a run went; the exit status, 1 when a question could not be answered."""
    rate = outcome.asked / outcome.seconds if outcome.seconds else 0.0
    say(f"{outcome.asked} answered in {outcome.seconds:.1f} s ({rate:.1f}/s), {outcome.found} from before: {answers}")
    for question_id, error in outcome.failures[:10]:
        say(f"failed: question {question_id}: {error}")
    if outcome.failures:
        say(f"{len(outcome.failures)} question(s) failed and are marked in the answers; run again to retry them.")
    return 1 if outcome.failures else 0
