"""Annotation files of any size: JSON arrays, JSON Lines (`*.jsonl`) and Parquet (`*.parquet`), in upper case as well.

Files are memory-mapped, so that data loader workers share them, and records are parsed on access; a process holds 16
bytes per record.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, overload

import numpy as np
import numpy.typing as npt

from llava.errors import DataError
from llava.utils import describe_content, require

SUFFIXES: Final = (".json", ".jsonl", ".parquet")
_CHUNK: Final = 2**20  # bytes scanned at a time, so that intermediate arrays fit the cache of a core
_BOM: Final = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH = b'"\\'
_OPEN, _CLOSE, _OPEN_LIST, _CLOSE_LIST = b"{}[]"
Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


class Records(Sequence[object]):
    """Records of a file, in order; accessing one that is not valid JSON raises `DataError`. Pickled as a path."""

    path: Path

    def __reduce__(self) -> tuple[object, ...]:
        return read_records, (self.path,)

    @abstractmethod
    def _item(self, index: int) -> object: ...

    @overload
    def __getitem__(self, index: int) -> object: ...
    @overload
    def __getitem__(self, index: slice) -> list[object]: ...
    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"Record index {index} is out of range: {self.path} has {len(self)} records")
        return self._item(index % len(self))


class JsonRecords(Records):
    """Records of a JSON or JSON Lines file; `offsets` (N, 2) are their [start, end) bytes."""

    def __init__(self, path: Path, offsets: Offsets):
        self.path, self.offsets = path, offsets
        self._bytes = np.memmap(path, np.uint8, "r").data

    def __len__(self) -> int:
        return len(self.offsets)

    def raw(self, index: int) -> bytes:
        start, end = self.offsets[index].tolist()
        return self._bytes[start:end].tobytes()

    def _item(self, index: int) -> object:
        try:
            return _loads(self.raw(index).decode("utf-8"))
        except ValueError as error:
            raise DataError(f"the record is not valid JSON: {str(error).strip()}") from error


class ListRecords(Records):
    """Items of a JSON array that holds more than objects, in memory."""

    def __init__(self, path: Path, items: list[object]):
        self.path, self.items = path, items

    def __len__(self) -> int:
        return len(self.items)

    def _item(self, index: int) -> object:
        return self.items[index]


class ParquetRecords(Records):
    """Rows of a Parquet file; `conversations` or `messages` is a list of structs, or its JSON text."""

    def __init__(self, path: Path):
        parquet = require("pyarrow.parquet", "train")
        try:
            self.table = parquet.read_table(path, memory_map=True)
        except (OSError, ValueError) as error:  # exceptions of Arrow are ValueErrors
            with path.open("rb") as file:
                found = describe_content(file.read(1024)) or " ".join(str(error).split())
            raise DataError(f"Annotation file {path} is not valid Parquet: {found}.") from error
        self.path = path

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _item(self, index: int) -> object:
        try:
            (row,) = self.table.slice(index, 1).to_pylist()
            for key in ("conversations", "messages"):
                if isinstance(row.get(key), str):
                    row[key] = _loads(row[key])
        except ValueError as error:
            raise DataError(f"{key} is not valid JSON: {str(error).strip()}") from error
        return {key: value for key, value in row.items() if value is not None}  # columns cannot omit a key


def read_records(path: str | Path) -> Records:
    """Index the records of an annotation file, in seconds for a million of them.

    Raises `DataError` for a missing or empty file and for a malformed array; a malformed record raises on access.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".parquet":
            records: Records = ParquetRecords(path)
        else:
            offsets = _find_offsets(path, size)
            if offsets is None:
                records = _parse_whole(path)
            else:
                records = JsonRecords(path, offsets) if len(offsets) else ListRecords(path, [])
    except OSError as error:
        raise DataError(f"Cannot read annotation file {path}: {error.strerror}; check --data_path.") from error
    if not len(records):
        raise DataError(f"Annotation file {path} holds an array without records; expected an array of objects.")
    return records


def _parse_whole(path: Path) -> ListRecords:
    content = path.read_bytes()
    try:
        items = _loads(content.decode("utf-8-sig"))
    except ValueError as error:
        hint = "; name a file with one record per line *.jsonl" if str(error).startswith("Extra data") else ""
        found = describe_content(content) or f"{str(error).strip()}{hint}"
        raise DataError(f"Annotation file {path} is not valid JSON: {found}.") from error
    if not isinstance(items, list):
        raise DataError(
            f"Annotation file {path} holds {type(items).__name__}; expected an array of objects (pass a mixture of "
            "datasets with --meta_path)."
        )
    return ListRecords(path, items)


def _loads(text: str) -> object:
    try:
        parsed: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return parsed


def _find_offsets(path: Path, size: int) -> Offsets | None:
    """Offsets (N, 2) of the records, or None if the file is not JSON Lines or an array of objects only."""
    is_lines = path.suffix.lower() == ".jsonl"
    if size == 0:
        return np.empty((0, 2), np.int64) if is_lines else None
    data = np.memmap(path, np.uint8, "r")
    head = data[:4096].tobytes()
    first = len(_BOM) if head.startswith(_BOM) else 0
    if is_lines and not head[first:].lstrip().startswith(b"["):
        return None if describe_content(head) else _line_offsets(data, first)
    return _object_offsets(data, first)


def _chunks(data: Bytes, first: int) -> Iterator[tuple[int, Bytes]]:
    """Offsets and chunks of the file; no chunk ends in a backslash, which would separate an escape sequence."""
    while first < len(data):
        stop = min(first + _CHUNK, len(data))
        while stop < len(data) and data[stop - 1] == _BACKSLASH:
            stop += 1
        yield first, np.asarray(data[first:stop])
        first = stop


def _line_offsets(data: Bytes, first: int) -> Offsets:
    """Offsets of non-blank lines."""
    ends = [np.flatnonzero(chunk == ord("\n")) + offset for offset, chunk in _chunks(data, first)]
    stops = np.concatenate([*ends, [len(data)]]).astype(np.int64)
    starts = np.concatenate([[first], stops[:-1] + 1])
    nonempty = stops > starts
    kept = nonempty.copy()
    kept[nonempty] = data[starts[nonempty]] == _OPEN
    for index in np.flatnonzero(nonempty & ~kept):
        kept[index] = bool(data[starts[index] : stops[index]].tobytes().strip())
    return np.stack([starts, stops], axis=1)[kept]


def _object_offsets(data: Bytes, first: int) -> Offsets | None:
    """Offsets of the objects in a JSON array, or None if the file holds anything else.

    Only brackets, quotes and backslashes are examined, and brackets count outside of strings.
    """
    quotes, depth = 0, 0
    begins, ends = [], []
    for offset, chunk in _chunks(data, first):
        at = np.flatnonzero((((chunk | 0x20) - np.uint8(0x7B)) <= 2) | (chunk == _QUOTE))  # one of "[\]{|}
        char = chunk[at]
        quote = (char == _QUOTE) & ~_escaped(at, char)
        in_string = (np.cumsum(quote, dtype=np.uint8) + np.uint8(quotes)) & 1
        brackets = np.flatnonzero((in_string == 0) & (char != _QUOTE))
        at, char = at[brackets], char[brackets]
        opens = (char == _OPEN) | (char == _OPEN_LIST)
        closes = (char == _CLOSE) | (char == _CLOSE_LIST)
        level = depth + np.cumsum(opens.astype(np.int64) - closes)
        begins.append(at[opens & (level == 2) & (char == _OPEN)] + offset)
        ends.append(at[closes & (level == 1) & (char == _CLOSE)] + offset + 1)
        quotes ^= int(np.count_nonzero(quote)) & 1
        depth = int(level[-1]) if len(level) else depth
    begin, end = (np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in (begins, ends))
    if len(begin) != len(end) or not len(begin):
        return None
    head, tail = data[first : begin[0]].tobytes(), data[end[-1] :].tobytes()
    valid = head.strip() == b"[" and tail.strip() == b"]" and _comma_separated(data, end[:-1], begin[1:])
    return np.stack([begin, end], axis=1) if valid else None


def _comma_separated(data: Bytes, starts: Offsets, stops: Offsets) -> bool:
    """Whether each gap [start, stop) holds one comma and whitespace; gaps equal to the first are compared at once."""
    if not len(starts):
        return True
    width = int(stops[0] - starts[0])
    equal = (stops - starts == width) & (width < 64)
    for offset in range(min(width, 64)):
        equal &= data[np.minimum(starts + offset, len(data) - 1)] == data[starts[0] + offset]
    gaps = {data[a:b].tobytes() for a, b in zip(starts[~equal], stops[~equal])}
    gaps.add(data[starts[0] : stops[0]].tobytes())
    return all(gap.strip() == b"," for gap in gaps)


def _escaped(at: Offsets, char: Bytes) -> npt.NDArray[np.bool_]:
    """Mask of the characters that follow an odd number of backslashes."""
    slash = np.flatnonzero(char == _BACKSLASH)
    escaped = np.zeros(len(at), np.bool_)
    if not len(slash):
        return escaped
    order = np.arange(len(slash))
    starts = np.append(True, np.diff(at[slash]) != 1)
    length = order - np.maximum.accumulate(np.where(starts, order, 0)) + 1  # backslashes in a row up to this one
    odd = slash[length % 2 == 1]
    following = odd + 1
    in_range = following < len(at)
    odd, following = odd[in_range], following[in_range]
    escaped[following[at[following] == at[odd] + 1]] = True
    return escaped
