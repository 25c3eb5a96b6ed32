"""JSON and JSON Lines files: validated reading, joins by key, and writing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import DataError
from llava.files import write_text

Row = dict[str, Any]  # a JSON object
Record = Mapping[str, Any]  # a JSON object that is only read
K = TypeVar("K", bound=Hashable)
R = TypeVar("R", bound=Record)


def read_lines(path: Path, *keys: str) -> Iterator[tuple[int, Row]]:
    """Yield the line number and object of each line of a JSON Lines file; every object must have `keys`.

    Blank lines are skipped. Raises `DataError` naming the file and the line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # Windows editors write a byte order mark
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path} line {number} is not JSON ({error.msg}); repair or remove it.") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number} is a {type(row).__name__}; expected a JSON object.")
                missing = [key for key in keys if key not in row]
                if missing:
                    found = ", ".join(row) or "no keys"
                    raise DataError(f"{path} line {number} is missing {' and '.join(missing)}; found {found}.")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error


def read_rows(path: Path, *keys: str) -> list[Row]:
    """All objects of a JSON Lines file; see `read_lines`."""
    return [row for _, row in read_lines(path, *keys)]


def by_key(rows: Iterable[R], path: Path, *keys: str) -> dict[Any, R]:
    """Index the rows of `path` by one key, or by the tuple of several. Raises `DataError` for a duplicate."""
    found: dict[Any, R] = {}
    for row in rows:
        key = row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)
        if key in found:
            raise DataError(f"{path} has duplicate rows for question {key!r}; not scored. Remove one of them.")
        found[key] = row
    return found


def require_same(answered: Iterable[K], asked: Iterable[K], path: Path) -> None:
    """Raise `DataError` unless the answers of `path` match the questions one to one."""
    given, wanted = Counter(list(answered)), Counter(list(asked))
    for rest, problem in ((wanted - given, "missing"), (given - wanted, "without a matching question")):
        if rest:
            raise DataError(
                f"{path} does not match the questions: {sum(rest.values())} answer(s) {problem}, the first "
                f"{next(iter(rest))!r}; not scored."
            )


def require_labels(answered: Iterable[K], labelled: Container[K], path: Path) -> None:
    """Raise `DataError` unless every answered question has a label in `path`."""
    unknown = [key for key in answered if key not in labelled]
    if unknown:
        raise DataError(f"{path} has no label for {len(unknown)} question(s), the first {unknown[0]!r}; not scored.")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `DataError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Write a JSON file and create its parent directories."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False))


def write_jsonl(path: Path, rows: Sequence[Record]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
