"""Benchmark questions: the `Question` record, question files, chunks, and evenly spaced subsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llava.errors import ConfigError, DataError
from llava.eval.run.files import read_lines

T = TypeVar("T")
QuestionId = str | int
QuestionKey = tuple[QuestionId, str, int | None]

SHORT_SUFFIX = "Answer the question using a single word or phrase."
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
LETTER_SUFFIX_CN = "请直接回答选项字母。"


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    `prompt` is recorded with the answer; the model receives `text`, or `prompt` if that is None. `images` are names in
    an `ImageSource`. `question_id` may repeat (MME has two questions per image). The last three fields belong to
    MMBench: the round, the options in the order shown, and their original letters.
    """

    question_id: QuestionId
    prompt: str
    images: tuple[str, ...] = ()
    text: str | None = None
    round_id: int | None = None
    options: tuple[str, ...] = ()
    option_char: tuple[str, ...] = ()

    @property
    def key(self) -> QuestionKey:
        """Identity of the question within a benchmark, repeated by its answer record."""
        return self.question_id, self.prompt, self.round_id


def split_list(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """Split into exactly `n` consecutive chunks of ceil(len / n) items; the last ones may be shorter or empty."""
    if n < 1:
        raise ConfigError(f"The number of chunks must be at least 1, got {n}.")
    return [get_chunk(items, n, k) for k in range(n)]


def get_chunk(items: Sequence[T], n: int, k: int) -> Sequence[T]:
    """Chunk `k` of `n`, possibly empty."""
    positions = chunk_range(len(items), n, k)
    return items[positions.start : positions.stop]


def chunk_range(total: int, n: int, k: int) -> range:
    """Positions of chunk `k` of `n` among `total` items."""
    if n < 1 or not 0 <= k < n:
        raise ConfigError(f"The chunk index must be between 0 and {n - 1} for {n} chunk(s), got {k}.")
    size = max(1, math.ceil(total / n))
    return range(min(k * size, total), min((k + 1) * size, total))


def subsample(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """`limit` evenly spaced items, the same in every call; all items if `limit` is None or not smaller."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ConfigError(f"The limit must be at least 1, got {limit}.")
    return [items[index * len(items) // limit] for index in range(limit)]


def read_questions(path: Path) -> list[Question]:
    """Read a JSON Lines question file with `question_id`, `text` and optionally `image` (a name or a list)."""
    questions = []
    for number, row in read_lines(path, "question_id", "text"):
        image = row.get("image")
        images = tuple(image) if isinstance(image, list) else (image,) if image else ()
        if not all(isinstance(text, str) for text in (row["text"], *images)):
            raise DataError(f"{path} line {number} has a text or an image that is not a string; put it in quotes.")
        questions.append(Question(row["question_id"], row["text"], images))
    return questions
