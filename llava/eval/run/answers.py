"""Answers files: JSON Lines in question order, flushed after every answer and resumable after a crash.

A failed question has an empty `text` and a reason in `metadata.error`. Scorers reject it; the next run retries it.
`metadata.thinking` is what a server's model thought before its answer; other keys describe the inputs (`input_facts`)
and the end of the answer, so that `llava report --diff` can compare them.
Scorers read `final_answer` of a text, which leaves out the model's thinking.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from llava.errors import DataError
from llava.eval.run.files import Record, Row, by_key, read_rows
from llava.eval.run.questions import Question, QuestionId, QuestionKey
from llava.files import OrderedWriter, lock_file
from llava.openai_protocol import Reply

FAILED_TEXT: Final = "#ERROR#"  # the answer of `qa_baseline_gpt35` if the server gave none
_TAGGED: Final = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def answer_id(*parts: object) -> str:
    """22 characters derived from the content, so that repeated runs write identical files."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def answer_row(model_id: str, question: Question, text: str, error: str | None) -> Row:
    """The published record of a question, its answer, and the reason why there is none."""
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


def input_facts(prompt: str, digests: Iterable[bytes], *, is_first: bool) -> Row:
    """Input facts in an answer's `metadata`: hashes of the prompt and of the images.

    The first answer of a run also has the prompt itself.
    """
    facts = {"prompt_hash": short_hash(prompt.encode()), "image_hashes": [digest.hex()[:16] for digest in digests]}
    return {**facts, "first_prompt": prompt} if is_first else facts


def short_hash(content: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def row_error(row: Record) -> str | None:
    """The reason why a record has no answer, None if it has one."""
    metadata = row.get("metadata")
    error = metadata.get("error") if isinstance(metadata, dict) else None
    error = "no reply" if error is None and row.get("text") == FAILED_TEXT else error
    return None if error is None else str(error)


def final_answer(text: str) -> str:
    """An answer without the model's thinking: what follows `</think>`, and the content of a single `<answer>`.

    Empty if the model was still thinking when it stopped.
    """
    reply = Reply(text).split_thinking()
    text = text if reply.text == text else reply.text.strip()
    tagged = _TAGGED.findall(text)
    return str(tagged[0]).strip() if len(tagged) == 1 else text


def _scored(rows: Sequence[Row], path: Path) -> list[Row]:
    """The records with their final answers. Raises `DataError` for texts and ids of other types."""
    for row in rows:
        texts = (row.get("text"), row.get("prompt", ""))
        if not all(isinstance(text, str) for text in texts) or not isinstance(row["question_id"], (str, int)):
            raise DataError(
                f"{path} has the answer {row.get('text')!r} to question {row['question_id']!r}; expected a string, and "
                "a string or an integer."
            )
    return [{**row, "text": final_answer(row["text"])} for row in rows]


def row_key(row: Record) -> QuestionKey:
    """`Question.key` of the question that a record answers."""
    return row["question_id"], row["prompt"], row.get("round_id")


def read_complete_lines(path: Path) -> list[Row]:
    """The records of an answers file without a partial last line; none if the file does not exist."""
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row_key(row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is not an answer record; repair it or use --overwrite.") from error
        rows.append(row)
    return rows


def read_answers(path: Path, questions: Sequence[Question]) -> list[Row]:
    """The records written so far, without a partial last line. Raises `DataError` if they answer other questions."""
    rows = read_complete_lines(path)
    if len(rows) > len(questions):
        raise DataError(f"{path} has more rows than the {len(questions)} questions; use --overwrite or another file.")
    for number, (row, question) in enumerate(zip(rows, questions), 1):
        if row_key(row) != question.key:
            raise DataError(
                f"{path} line {number} answers question {row['question_id']!r}, expected question "
                f"{question.question_id!r}; the question file changed: use --overwrite or another answers file."
            )
    return rows


def complete_answers(path: Path, questions: Sequence[Question]) -> list[Row]:
    """One record per question, for a scorer. Raises `DataError` if an answer is missing or failed."""
    rows = read_answers(path, questions)
    failed = [row for row in rows if row_error(row) is not None]
    if len(rows) < len(questions) or failed:
        first = failed[0]["question_id"] if failed else questions[len(rows)].question_id
        raise DataError(
            f"{path} has {len(rows)} of {len(questions)} answers, {len(failed)} of them failed; not scored. The first "
            f"question without an answer is {first!r}: run the same command again to complete them."
        )
    return _scored(rows, path)


def read_results(path: Path, *keys: str) -> list[Row]:
    """The records of an answers file with `question_id`, `text` and `keys`, in any order.

    Raises `DataError` if there are none, or one failed or has values of other types.
    """
    rows = _scored(read_rows(path, "question_id", "text", *keys), path)
    failed = [row for row in rows if row_error(row) is not None]
    if failed:
        raise DataError(
            f"{path} has {len(failed)} failed answer(s), the first to question {failed[0]['question_id']!r} "
            f"({row_error(failed[0])}); not scored. Run the same command again to retry them."
        )
    if not rows:
        raise DataError(f"{path} has no answers to score.")
    return rows


def read_texts(path: Path) -> dict[QuestionId, str]:
    """The answers of a file by question id, which must be unique; see `read_results`."""
    return {key: row["text"] for key, row in by_key(read_results(path), path, "question_id").items()}


class AnswersWriter(OrderedWriter):
    """Writer of the answers to `questions`, which retries failed ones; `known` are answers of other files by position.

    Raises `DataError` if the file answers other questions, `ConfigError` if another process is writing it.
    """

    def __init__(self, path: Path, questions: Sequence[Question], known: Mapping[int, Row] | None = None) -> None:
        lock = lock_file(path)
        try:
            rows = read_answers(path, questions)
        except DataError:
            lock.close()
            raise
        super().__init__(path, lock, rows, lambda row: row_error(row) is not None, known)
