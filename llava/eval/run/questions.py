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

SHORT_SUFFIX = "Answer the question using a single word or phrase."
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
LETTER_SUFFIX_CN = "请直接回答选项字母。"


@dataclass(frozen=True)
class Question:
    """One question. `prompt` is what the scorers read back; `text` is sent to the model when it differs.

    `images` are names in a `ImageSource`, mostly paths below a folder. `question_id` may repeat (spec/eval.md §1.2):
    the position counts. The last three are MMBench's: the round, the options as shown, and their original letters.
    """

    question_id: Any
    prompt: str
    images: tuple[str, ...] = ()
    text: str | None = None
    round_id: int | None = None
    options: tuple[str, ...] = ()
    option_char: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, str, int | None]:
        """What an answer must repeat to be the answer to this question."""
        return self.question_id, self.prompt, self.round_id


def split_list(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """Cut into exactly `n` consecutive chunks of ceil(len / n) items, the last ones shorter or empty (§1.1)."""
    if n < 1:
        raise ConfigError(f"The number of chunks is {n}; it must be at least 1.")
    return [get_chunk(items, n, k) for k in range(n)]


def get_chunk(items: Sequence[T], n: int, k: int) -> Sequence[T]:
    """Chunk `k` of `n`, empty when there are too few items."""
    where = chunk_range(len(items), n, k)
    return items[where.start : where.stop]


def chunk_range(total: int, n: int, k: int) -> range:
    """Positions of chunk `k` of `n` among `total` items."""
    if n < 1 or not 0 <= k < n:
        raise ConfigError(f"The chunk index is {k}; with {n} chunk(s) it must lie in 0 … {n - 1}.")
    size = max(1, math.ceil(total / n))
    return range(min(k * size, total), min((k + 1) * size, total))


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
        with path.open(encoding="utf-8-sig") as file:  # Windows puts a mark before the first line
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
        if not all(isinstance(text, str) for text in (row["text"], *images)):
            raise DataError(f"{path} line {number} has a text or an image that is not a string; put it in quotes.")
        questions.append(Question(row["question_id"], row["text"], images))
    return questions


def read_science_questions(path: Path, single_pred_prompt: bool = False) -> list[Question]:
    """ScienceQA's question file (spec/eval.md §2.3, §3.2): a JSON list of conversations, asked by their first turn.

    The record's prompt shows `<image>` where there is one; `single_pred_prompt` adds the line that asks for a letter.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        asked = [(row["id"], row.get("image"), str(row["conversations"][0]["value"])) for row in rows]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a list of ScienceQA conversations ({type(error).__name__}: {error})."
        ) from error
    questions = []
    for question_id, image, value in asked:
        text = value.replace("<image>", "").strip() + (f"\n{LETTER_SUFFIX}" if single_pred_prompt else "")
        prompt = f"<image>\n{text}" if image else text
        questions.append(Question(question_id, prompt, (image,) if image else (), text))
    return questions
