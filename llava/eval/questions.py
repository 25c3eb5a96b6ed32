"""Questions of a benchmark: what is asked, of which pictures, and how a file of them is read and cut into chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import ConfigError, DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One question. `prompt` is what the scorers read back; `text` is sent to the model when it differs.

    `images` are paths below the image folder. `question_id` may repeat (spec/eval.md §1.2): the position counts.
    """

    question_id: Any
    prompt: str
    images: tuple[str, ...] = ()
    text: str | None = None


def split_list(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """Cut into exactly `n` consecutive chunks of ceil(len / n) items, the last ones shorter or empty (§1.1)."""
    if n < 1:
        raise ConfigError(f"The number of chunks is {n}; it must be at least 1.")
    size = max(1, math.ceil(len(items) / n))
    return [items[k * size : (k + 1) * size] for k in range(n)]


def get_chunk(items: Sequence[T], n: int, k: int) -> Sequence[T]:
    """Chunk `k` of `n`, empty when there are too few items."""
    if not 0 <= k < n:
        raise ConfigError(f"The chunk index is {k}; with {n} chunk(s) it must lie in 0 … {n - 1}.")
    return split_list(items, n)[k]


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """`limit` items evenly spread over all of them, always the same ones; all when `limit` is None or large."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ConfigError(f"The limit is {limit}; it must be at least 1.")
    return [items[index * len(items) // limit] for index in range(limit)]


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON Lines file; `DataError` names the file and line of what is wrong."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path} line {number} is not JSON ({error.msg}); repair or remove it.") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number} is a {type(row).__name__}; expected a JSON object.")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error


def read_questions(path: Path) -> list[Question]:
    """A question file of spec/eval.md §3.2: JSON Lines with `question_id`, `text` and optionally `image`."""
    questions = []
    for number, row in read_lines(path):
        missing = [key for key in ("question_id", "text") if key not in row]
        if missing:
            raise DataError(
                f"{path} line {number} lacks {' and '.join(missing)}; it has {', '.join(row) or 'no keys'}."
            )
        image = row.get("image")
        images = tuple(image) if isinstance(image, list) else (image,) if image else ()
        questions.append(Question(row["question_id"], row["text"], images))
    return questions
