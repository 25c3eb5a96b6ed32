"""Files of the scorers: answers that may be scored, JSON in and out. Refuses what EVAL-4 says must not be scored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import DataError
from llava.eval.run.answers import Row, failure
from llava.eval.run.questions import read_lines
from llava.files import write_text

K = TypeVar("K", bound=Hashable)


def read_rows(path: Path, *keys: str) -> list[Row]:
    """The objects of a JSON Lines file, each of which must have `keys`."""
    rows = []
    for number, row in read_lines(path):
        missing = [key for key in keys if key not in row]
        if missing:
            raise DataError(
                f"{path} line {number} lacks {' and '.join(missing)}; it has {', '.join(row) or 'no keys'}."
            )
        rows.append(row)
    return rows


def read_results(path: Path, *keys: str) -> list[Row]:
    """The rows of an answers file, with `question_id`, `text` and `keys`; `DataError` when one failed or none is."""
    rows = read_rows(path, "question_id", "text", *keys)
    for row in rows:
        if not isinstance(row["text"], str) or not isinstance(row["question_id"], (str, int)):
            raise DataError(
                f"{path} has the answer {row['text']!r} to question {row['question_id']!r}; expected a text, and a "
                "text or a number."
            )
    failed = [row for row in rows if failure(row) is not None]
    if failed:
        raise DataError(
            f"{path} has {len(failed)} failed answer(s), the first for question {failed[0]['question_id']!r} "
            f"({failure(failed[0])}); not scored. Run the same command again to answer them."
        )
    if not rows:
        raise DataError(f"{path} holds no answers; there is nothing to score.")
    return rows


def by_key(rows: Iterable[Mapping[str, Any]], path: Path, *keys: str) -> dict[Any, Any]:
    """Rows by the value of a key (a tuple of values for several); `DataError` when two rows share it."""
    found: dict[Any, Any] = {}
    for row in rows:
        key = row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)
        if key in found:
            raise DataError(f"{path} has two rows for question {key!r}: a duplicate; not scored. Remove one of them.")
        found[key] = row
    return found


def require_same(answered: Iterable[K], asked: Iterable[K], path: Path) -> None:
    """`DataError` unless the answers of `path` are to exactly the questions asked, each as often as it was asked."""
    given, wanted = Counter(list(answered)), Counter(list(asked))
    for some, label in ((wanted - given, "missing (unanswered)"), (given - wanted, "to none of the questions")):
        if some:
            raise DataError(
                f"{path} does not match the questions: {sum(some.values())} answer(s) {label}, the first "
                f"{next(iter(some))!r}; not scored."
            )


def read_json(path: Path) -> Any:
    """The value in a JSON file; `DataError` naming it when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON file, its folder too."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False))


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
