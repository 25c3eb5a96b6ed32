"""The answers file: JSON Lines in question order, appended and flushed as answers come, resumable at any byte.

A question that could not be answered has an empty `text` and its reason under `metadata.error`; no scorer accepts it,
and the next run asks it again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llava.errors import ConfigError, DataError
from llava.eval.run.questions import Question
from llava.files import write_errors

Row = dict[str, Any]
MakeRow = Callable[[Question, str, str | None], Row]


def answer_id(*parts: Any) -> str:
    """22 characters that depend on the content only, so that a rerun is identical byte for byte (defect R21)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def answer_row(model_id: str) -> MakeRow:
    """Builder of the published record (spec/eval.md §1.2); arguments: question, answer, error or None."""

    def make(question: Question, text: str, error: str | None) -> Row:
        rounds, shown = {}, {}
        if question.round_id is not None:
            rounds = {"round_id": question.round_id}
            shown = {"options": list(question.options), "option_char": list(question.option_char)}
        return {
            "question_id": question.question_id,
            **rounds,
            "prompt": question.prompt,
            "text": text,
            **shown,
            "answer_id": answer_id(model_id, question.question_id, question.prompt, *rounds.values(), text),
            "model_id": model_id,
            "metadata": {} if error is None else {"error": error},
        }

    return make


def failure(row: Row) -> str | None:
    """Why this row has no answer, None if it has one."""
    metadata = row.get("metadata")
    error = metadata.get("error") if isinstance(metadata, dict) else None
    return None if error is None else str(error)


def read_answers(path: Path, questions: Sequence[Question]) -> list[Row]:
    """The rows written so far, checked by position against the questions; a torn last line is left out.

    Raises `DataError` when the file belongs to other questions.
    """
    rows = written_rows(path)
    if len(rows) > len(questions):
        raise DataError(f"{path} has more rows than the {len(questions)} questions; use --overwrite or another file.")
    for number, (row, question) in enumerate(zip(rows, questions), 1):
        if key_of(row) != question.key:
            raise DataError(
                f"{path} line {number} answers question {row['question_id']!r}, but question {question.question_id!r} "
                "stands at this place; the question file changed: use --overwrite or another answers file."
            )
    return rows


def written_rows(path: Path) -> list[Row]:
    """The whole lines of an answers file; none when there is no file."""
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # what follows the last newline is torn
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key_of(row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is not an answer record; repair it or use --overwrite.") from error
        rows.append(row)
    return rows


def key_of(row: Row) -> tuple[Any, str, int | None]:
    """`Question.key` of the question that a row answers."""
    return row["question_id"], row["prompt"], row.get("round_id")


def complete_answers(path: Path, questions: Sequence[Question]) -> list[Row]:
    """All rows, for a scorer; `DataError` when one is missing or failed (EVAL-4)."""
    rows = read_answers(path, questions)
    failed = [row for row in rows if failure(row) is not None]
    if len(rows) < len(questions) or failed:
        first = failed[0]["question_id"] if failed else questions[len(rows)].question_id
        raise DataError(
            f"{path} has {len(rows)} of {len(questions)} answers, {len(failed)} of them failed; not scored. The first "
            f"without an answer is question {first!r}: run the same command again to answer what is missing."
        )
    return rows


class AnswersWriter:
    """Writes rows in question order however they come; an existing file is continued. One process at a time may.

    `known` are rows from elsewhere, by position; `finished` the positions that need no asking. When failed rows are to
    be asked again the file is rewritten beside the old one, which stays until the new one is complete.
    """

    def __init__(self, path: Path, questions: Sequence[Question], known: Mapping[int, Row] | None = None) -> None:
        self.path = path
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
        try:
            rows = read_answers(path, questions)
        except DataError:
            self._lock.close()
            raise
        self._retry = any(failure(row) is not None for row in rows)
        self._next = 0 if self._retry else len(rows)
        own = {at: row for at, row in enumerate(rows) if failure(row) is None}
        self._held = {at: row for at, row in ({**(known or {}), **own}).items() if at >= self._next}
        self.finished = frozenset((*own, *self._held))
        with write_errors(path):
            self._file = self._open(rows)
        self._flush()

    def _open(self, rows: Sequence[Row]) -> TextIO:
        if self._retry:
            return self._temporary.open("w", encoding="utf-8", newline="\n")
        if self.path.is_file():
            cut_torn_line(self.path)
        return self.path.open("a", encoding="utf-8", newline="\n")

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".retry")

    def put(self, position: int, row: Row) -> None:
        """Accept the row of a position; it is written once all before it are."""
        self._held[position] = row
        self._flush()

    def _flush(self) -> None:
        start = self._next
        with write_errors(self.path):
            while self._next in self._held:
                self._file.write(json.dumps(self._held.pop(self._next)) + "\n")
                self._next += 1
            if self._next > start:
                self._file.flush()

    def close(self, *, complete: bool) -> None:
        """Close; with `complete`, a rewritten file replaces the old one."""
        with self._lock, write_errors(self.path):
            self._file.close()
            if self._retry and complete:
                self._temporary.replace(self.path)


def cut_torn_line(path: Path) -> None:
    """Shorten a file of lines to its last newline: what follows was being written when its program ended."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def lock(path: Path) -> TextIO:
    """Hold a file until the handle is closed or the process ends; `ConfigError` when another process holds it."""
    handle = path.open("a", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # Windows, where two writers are not kept apart
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise ConfigError(f"Another process is writing {path}; wait for it, or stop it.") from error
    except OSError:  # a file system without locks
        return handle
    return handle
