"""Annotation files of any size: records found by their place in the file and parsed when asked for.

The file is memory-mapped, so that a data loader's workers share it; what a process holds is 16 bytes a record. Formats
are a JSON array, JSON Lines (`*.jsonl`) and Parquet (`*.parquet`); spec/train.md §3.1 says what a record is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from llava.errors import DataError
from llava.utils import require

SUFFIXES: Final = (".json", ".jsonl", ".parquet")
_CHUNK: Final = 2**20  # what is made of it fits a core's cache
_BOM: Final = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPEN, _CLOSE, _OPEN_LIST, _CLOSE_LIST = b"{}[]"
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


class Records(Sequence[Any]):
    """The records of a file in order; an item that cannot be parsed raises `DataError`. Pickled as its path."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return read_records, (self.path,)

    def _item(self, index: int) -> Any:
        raise NotImplementedError  # pragma: no cover

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, not {index}")
        return self._item(index % len(self))


class JsonRecords(Records):
    """Records at known `places` (N, 2), [start, end) in bytes, of a JSON or JSON Lines file."""

    def __init__(self, path: Path, places: Places):
        self.path, self.places = path, places
        self._bytes = np.memmap(path, np.uint8, "r").data

    def __len__(self) -> int:
        return len(self.places)

    def raw(self, index: int) -> bytes:
        start, end = self.places[index].tolist()
        return self._bytes[start:end].tobytes()

    def _item(self, index: int) -> Any:
        try:
            return _loads(self.raw(index).decode("utf-8"))
        except ValueError as error:
            raise DataError(f"it is not valid JSON: {str(error).strip()}") from error


class ListRecords(Records):
    """The items of an array that does not hold objects only, all in memory."""

    def __init__(self, path: Path, items: list[Any]):
        self.path, self.items = path, items

    def __len__(self) -> int:
        return len(self.items)

    def _item(self, index: int) -> Any:
        return self.items[index]


class ParquetRecords(Records):
    """The rows of a Parquet file; `conversations` is a list of structs, or text holding JSON."""

    def __init__(self, path: Path):
        parquet = require("pyarrow.parquet", "train")
        try:
            self.table: Any = parquet.read_table(path, memory_map=True)
        except (OSError, ValueError) as error:  # Arrow's own exceptions are ValueErrors
            raise DataError(f"Annotation file {path} is not valid Parquet: {' '.join(str(error).split())}.") from error
        self.path = path

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _item(self, index: int) -> Any:
        try:
            (row,) = self.table.slice(index, 1).to_pylist()
            turns = row.get("conversations")
            if isinstance(turns, str):
                row["conversations"] = _loads(turns)
        except ValueError as error:
            raise DataError(f"its conversations are not valid JSON: {str(error).strip()}") from error
        return {key: value for key, value in row.items() if value is not None}  # a column stands for absent keys too


def read_records(path: str | Path) -> Records:
    """The records of an annotation file, in seconds also for a million of them.

    Raises `DataError` for a missing file, a broken array (with its place) or a file without records. A record that
    is broken by itself raises when it is asked for.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.suffix == ".parquet":
            records: Records = ParquetRecords(path)
        else:
            places = _places(path, size)
            records = (
                _whole(path) if places is None else JsonRecords(path, places) if len(places) else ListRecords(path, [])
            )
    except OSError as error:
        raise DataError(f"Cannot read annotation file {path}: {error.strerror}; check --data_path.") from error
    if not len(records):
        raise DataError(f"Annotation file {path} holds an array without records; expected an array of objects.")
    return records


def _whole(path: Path) -> ListRecords:
    try:
        items = _loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        hint = "; a file with one record a line is called *.jsonl" if str(error).startswith("Extra data") else ""
        raise DataError(f"Annotation file {path} is not valid JSON: {str(error).strip()}{hint}.") from error
    if not isinstance(items, list):
        raise DataError(
            f"Annotation file {path} holds {type(items).__name__}; expected an array of objects (a mixture of data "
            "sets is given with --meta_path)."
        )
    return ListRecords(path, items)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _places(path: Path, size: int) -> Places | None:
    if size == 0:
        return np.empty((0, 2), np.int64) if path.suffix == ".jsonl" else None
    data = np.memmap(path, np.uint8, "r")
    first = len(_BOM) if data[:3].tobytes() == _BOM else 0
    return _lines(data, first) if path.suffix == ".jsonl" else _objects(data, first)


def _chunks(data: Bytes, first: int) -> Iterator[tuple[int, Bytes]]:
    """Offsets and pieces of the file; none ends in a backslash, which belongs to the character behind it."""
    while first < len(data):
        stop = min(first + _CHUNK, len(data))
        while stop < len(data) and data[stop - 1] == _BACKSLASH:
            stop += 1
        yield first, np.asarray(data[first:stop])
        first = stop


def _lines(data: Bytes, first: int) -> Places:
    """Lines that hold more than blanks."""
    ends = [np.flatnonzero(chunk == ord("\n")) + offset for offset, chunk in _chunks(data, first)]
    stops = np.concatenate([*ends, [len(data)]]).astype(np.int64)
    starts = np.concatenate([[first], stops[:-1] + 1])
    some = stops > starts
    plain = some.copy()
    plain[some] = data[starts[some]] == _OPEN
    for index in np.flatnonzero(some & ~plain):
        plain[index] = bool(data[starts[index] : stops[index]].tobytes().strip())
    return np.stack([starts, stops], axis=1)[plain]


def _objects(data: Bytes, first: int) -> Places | None:
    """Where the objects of a JSON array lie, or None if it is not an array of nothing but objects.

    Only brackets, quotes and backslashes are looked at, and of them only those outside of strings count.
    """
    quotes, depth = 0, 0
    begins, ends = [], []
    for offset, chunk in _chunks(data, first):
        at = np.flatnonzero((((chunk | 0x20) - np.uint8(0x7B)) <= 2) | (chunk == _QUOTE))  # one of "[\]{|}
        kind = chunk[at]
        quote = (kind == _QUOTE) & ~_escaped(at, kind)
        inside = np.cumsum(quote, dtype=np.uint8) + np.uint8(quotes)  # its last bit
        outside = np.flatnonzero(((inside & 1) == 0) & (kind != _QUOTE))
        at, kind = at[outside], kind[outside]
        opens = (kind == _OPEN) | (kind == _OPEN_LIST)
        closes = (kind == _CLOSE) | (kind == _CLOSE_LIST)
        level = depth + np.cumsum(opens.astype(np.int64) - closes)
        begins.append(at[opens & (level == 2) & (kind == _OPEN)] + offset)
        ends.append(at[closes & (level == 1) & (kind == _CLOSE)] + offset + 1)
        quotes ^= int(np.count_nonzero(quote)) & 1
        depth = int(level[-1]) if len(level) else depth
    begin, end = (np.concatenate(places) if places else np.empty(0, np.int64) for places in (begins, ends))
    if len(begin) != len(end) or not len(begin):
        return None
    head, tail = data[first : begin[0]].tobytes(), data[end[-1] :].tobytes()
    sound = head.strip() == b"[" and tail.strip() == b"]" and _all_commas(data, end[:-1], begin[1:])
    return np.stack([begin, end], axis=1) if sound else None


def _all_commas(data: Bytes, starts: Places, stops: Places) -> bool:
    """Whether nothing but a comma and blanks stands in each of these gaps; as a rule they are alike."""
    if not len(starts):
        return True
    width = int(stops[0] - starts[0])
    alike = (stops - starts == width) & (width < 64)
    for place in range(min(width, 64)):
        alike &= data[np.minimum(starts + place, len(data) - 1)] == data[starts[0] + place]
    gaps = {data[a:b].tobytes() for a, b in zip(starts[~alike], stops[~alike])}
    gaps.add(data[starts[0] : stops[0]].tobytes())
    return all(gap.strip() == b"," for gap in gaps)


def _escaped(at: Places, kind: Bytes) -> npt.NDArray[np.bool_]:
    """Which of these bytes follow an odd number of backslashes."""
    slash = np.flatnonzero(kind == _BACKSLASH)
    escaped = np.zeros(len(at), np.bool_)
    if not len(slash):
        return escaped
    order = np.arange(len(slash))
    starts = np.append(True, np.diff(at[slash]) != 1)
    length = order - np.maximum.accumulate(np.where(starts, order, 0)) + 1  # of the run up to each backslash
    odd = slash[length % 2 == 1]
    following = odd + 1
    fits = following < len(at)
    odd, following = odd[fits], following[fits]
    escaped[following[at[following] == at[odd] + 1]] = True
    return escaped
