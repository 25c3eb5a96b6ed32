"""Resumable answering of a file of prompts, with JSON Lines as input and output.

Answers are written in the order of the prompts. A prompt that fails gets an empty `text` and the reason in
`metadata.error`; the next run retries it. `OUTPUT.manifest.json` records the settings, so that answers of different
settings are never mixed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from llava.conversation import get_template, stop_strings
from llava.engine import Engine, Request, RequestHandle, SamplingParams
from llava.engine.chat import render_question
from llava.errors import ConfigError, DataError, LlavaError, shorten
from llava.files import OrderedWriter, lock_file, write_errors
from llava.images import open_image, preprocess_image
from llava.provenance import checkpoint_fingerprint

Row = dict[str, object]


@dataclass(frozen=True)
class Prompt:
    """A prompt of the input file with the paths of its images."""

    prompt_id: object
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchSettings:
    """Settings that determine the answers, beside those of the engine."""

    model_path: str
    model_id: str
    template: str
    params: SamplingParams
    model_base: str | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class BatchResult:
    """Numbers of prompts answered now and before, the failed ones with their reasons, and the seconds taken."""

    answered: int
    resumed: int
    failures: tuple[tuple[object, str], ...]
    seconds: float

    def summary(self, output: Path) -> str:
        rate = self.answered / self.seconds if self.seconds else 0.0
        lines = [f"{self.answered} answered in {self.seconds:.1f} s ({rate:.1f}/s), {self.resumed} resumed: {output}"]
        lines += [f"failed: prompt {prompt_id}: {error}" for prompt_id, error in self.failures[:10]]
        if self.failures:
            lines.append(f"{len(self.failures)} prompt(s) failed; run the same command again to retry them.")
        return "\n".join(lines)


def read_prompts(path: Path) -> list[Prompt]:
    """Read rows `{"prompt": …, "image": path or list of paths, "id": …}`; `text`, `images` and `question_id` also work.

    The default id is the index of the row. Raises `DataError`, naming the line.
    """
    prompts: list[Prompt] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse_row(line, f"{path} line {number}")
        text, images = row.get("prompt", row.get("text")), row.get("images", row.get("image")) or []
        if not isinstance(text, str):
            keys = ", ".join(row) or "none"
            raise DataError(f"{path} line {number} must have a string `prompt`; its keys are: {keys}.")
        images = [images] if isinstance(images, str) else images
        if not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
            found = shorten(repr(images))
            raise DataError(f"{path} line {number}: `image` must be a path or a list of paths, got {found}.")
        prompt_id = row.get("id", row.get("question_id"))
        prompts.append(Prompt(len(prompts) if prompt_id is None else prompt_id, text, tuple(images)))
    return prompts


def _parse_row(line: str | bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object, got {type(row).__name__}.")
    return row


def answer_prompts(
    engine: Engine, source: Path, output: Path, settings: BatchSettings, *, overwrite: bool = False
) -> BatchResult:
    """Answer the prompts of `source` that `output` does not answer yet.

    Raises `ConfigError` when `output` has other settings or is being written by another process, and `DataError` when
    it answers other prompts; `overwrite` starts it anew.
    """
    prompts = read_prompts(source)
    identity: Row = {
        "model_id": settings.model_id,
        "conv_template": settings.template,
        "decoding": settings.params.as_dict() | {"stop": list(settings.params.stop)},
        "checkpoint": checkpoint_fingerprint(settings.model_path),
        "base": None if settings.model_base is None else checkpoint_fingerprint(settings.model_base),
        "quantization": settings.quantization,
        **engine.numerics(),
    }
    start, failures = time.monotonic(), []
    with AnswerFile(output, prompts, identity, overwrite=overwrite) as file:
        pending = [position for position in range(len(prompts)) if position not in file.finished]
        with tqdm(total=len(prompts), initial=len(file.finished), unit="prompt", desc=output.name) as bar:
            for position, text, error in _generate(engine, prompts, pending, settings):
                if error is not None:
                    failures.append((prompts[position].prompt_id, error))
                file.answer(position, text, error)
                bar.update()
    return BatchResult(len(pending), len(file.finished), tuple(failures), time.monotonic() - start)


def _generate(
    engine: Engine, prompts: Sequence[Prompt], positions: Sequence[int], settings: BatchSettings
) -> Iterator[tuple[int, str, str | None]]:
    """Yield (position, answer, error) as prompts finish. Images are opened in threads, ahead of the engine."""
    window = 2 * engine.max_batch_size
    running: dict[RequestHandle, int] = {}
    loading: deque[tuple[int, Future[list[Tensor]]]] = deque()
    remaining = iter(positions)

    def load(path: str) -> Tensor:
        return preprocess_image(open_image(path), engine.image_processor, engine.image_aspect_ratio)

    with ThreadPoolExecutor(4, "images") as pool:
        while True:
            for position in islice(remaining, window - len(loading)):
                images = prompts[position].images
                loading.append((position, pool.submit(lambda paths: [load(path) for path in paths], images)))
            while loading and len(running) < window:
                position, loaded = loading.popleft()
                try:
                    running[engine.submit(_request(engine, prompts[position], loaded.result(), settings))] = position
                except LlavaError as error:
                    yield position, "", str(error)
            if not (running or loading):
                return
            engine.step()
            for handle in [handle for handle in running if handle.done]:
                completion = handle.result()
                yield running.pop(handle), "" if completion.error else completion.text, completion.error


def _request(engine: Engine, prompt: Prompt, images: list[Tensor], settings: BatchSettings) -> Request:
    """Render a single turn. The seed depends on the prompt, not on the batch, so that sampling is reproducible."""
    template = get_template(settings.template)
    rendered = render_question(template, prompt.text, len(images), engine.model.config)
    params, seed = settings.params, None
    if params.temperature > 0 and params.seed is not None:
        seed = params.seed + zlib.crc32(f"{prompt.prompt_id}\n{prompt.text}".encode())
    params = dataclasses.replace(params, stop=(*params.stop, *stop_strings(template)), seed=seed)
    return Request(rendered, images, params, cache_prefix=False)


class AnswerFile(OrderedWriter):
    """Answers in the order of the prompts, continued and with failed ones retried; a context manager."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], identity: Row, *, overwrite: bool = False) -> None:
        self.prompts, self.model_id = prompts, identity["model_id"]
        manifest = path.with_name(f"{path.name}.manifest.json")
        lock = lock_file(path)
        try:
            if overwrite:
                os.truncate(path, 0)
            if path.stat().st_size:
                _check_identity(path, manifest, identity)
            rows = _read_answers(path, prompts)
        except BaseException:
            lock.close()
            raise
        with write_errors(path):
            manifest.write_text(json.dumps({"identity": identity}, indent=2) + "\n", encoding="utf-8")
        super().__init__(path, lock, rows, _is_failed)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)

    def answer(self, position: int, text: str, error: str | None) -> None:
        """Add the answer to a prompt."""
        prompt = self.prompts[position]
        row = {
            "question_id": prompt.prompt_id,
            "prompt": prompt.text,
            "images": list(prompt.images),
            "text": text,
            "model_id": self.model_id,
            "metadata": {} if error is None else {"error": error},
        }
        self.write(position, row)


def _read_answers(path: Path, prompts: Sequence[Prompt]) -> list[Row]:
    """The complete rows of a file; raises `DataError` when they do not answer the first prompts."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        row = _parse_row(line, f"{path} line {number}")
        prompt = prompts[number - 1] if number <= len(prompts) else None
        if prompt is None or (row.get("question_id"), row.get("prompt")) != (prompt.prompt_id, prompt.text):
            raise DataError(
                f"{path} line {number} does not answer prompt {number} of the input; choose another output file, or "
                "pass --overwrite."
            )
        rows.append(row)
    return rows


def _check_identity(path: Path, manifest: Path, identity: Row) -> None:
    """Raise `ConfigError` when the answers in `path` have other settings, or unknown ones."""
    remedy = "choose another output file, or pass --overwrite."
    try:
        before = json.loads(manifest.read_text(encoding="utf-8"))["identity"]
        differing = [key for key in identity if key in before and before[key] != identity[key]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} exists, but {manifest.name} with its settings cannot be read; {remedy}") from error
    for key in differing:
        raise ConfigError(f"{path} has {key} {before[key]!r}, but this run has {identity[key]!r}; {remedy}")


def _is_failed(row: Mapping[str, object]) -> bool:
    metadata = row.get("metadata")
    return isinstance(metadata, dict) and bool(metadata.get("error"))
