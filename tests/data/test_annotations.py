"""Annotation files: three formats, offsets of records in any JSON, and errors of malformed files."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data import annotations
from llava.data.annotations import JsonRecords, ListRecords, read_records
from llava.errors import DataError
from tests.data.test_records import GOOD

ODD = {**GOOD, "id": 'a "quoted" \\ {[ ]} \u2028 é 😀 \\\\'}


def test_both_json_formats(tmp_path: Path) -> None:
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps([GOOD, ODD], indent=1, ensure_ascii=False), encoding="utf-8-sig")
    lines.write_text(json.dumps(GOOD) + "\n\n \n" + json.dumps(ODD, ensure_ascii=False) + "\r\n  " + json.dumps(GOOD))
    for path, items in ((array, [GOOD, ODD]), (lines, [GOOD, ODD, GOOD])):
        records = read_records(path)
        assert isinstance(records, JsonRecords)
        assert list(records) == items and records[-1] == items[-1] and records[:2] == items[:2]
        assert list(pickle.loads(pickle.dumps(records))) == items  # noqa: S301 - our own
        with pytest.raises(IndexError, match="index 3 is out of range"):
            records[3]


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = {"conversations": GOOD["conversations"]}
    pq.write_table(pa.Table.from_pylist([GOOD, {"id": 8, **text}]), tmp_path / "a.parquet", row_group_size=1)
    assert list(read_records(tmp_path / "a.parquet")) == [GOOD, {"id": 8, **text}]
    rows = [{"image": ["a", "b"], "conversations": json.dumps(GOOD["conversations"])}, {"conversations": "[{"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    records = read_records(tmp_path / "b.parquet")
    assert records[0] == {"image": ["a", "b"], **text}
    with pytest.raises(DataError, match="conversations is not valid JSON"):
        records[1]


def test_arrays_in_lines_files_and_suffixes_in_upper_case(tmp_path: Path) -> None:
    """Also with a byte order mark, with Windows line ends, and with NaN, which Python writes."""
    array, lines = json.dumps([GOOD, ODD]), "\r\n".join(map(json.dumps, [GOOD, ODD]))
    nan = array.replace('"id": 7', '"id": NaN')
    for name, text in (("a.jsonl", "\n" + array), ("a.JSONL", lines), ("b.JSONL", array), ("a.JSON", array)):
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / name).write_bytes(text.encode(encoding))
            records = read_records(tmp_path / name)
            assert isinstance(records, JsonRecords) and list(records) == [GOOD, ODD]
    (tmp_path / "a.json").write_text(nan)
    assert [record["conversations"] for record in read_records(tmp_path / "a.json")] == [GOOD["conversations"]] * 2  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("missing.json", None, "check --data_path"),
        ("missing.parquet", None, "check --data_path"),
        ("a.json", b"[{", "is not valid JSON"),
        ("a.json", b'[{"a": 1}, {"b": "]', "is not valid JSON"),
        ("a.json", b'[{"a": 1} {"b": 1}]', "is not valid JSON"),
        ("a.json", b'[{"a": 1},, {"b": 1}]', "is not valid JSON"),
        ("a.json", b'[{"a": 1}] x', "is not valid JSON"),
        ("a.json", b"\xff\xfe", "is not valid JSON"),
        ("a.json", b"", "is not valid JSON"),
        ("a.json", b'{"a": 1}', "holds dict; expected an array of objects .*--meta_path"),
        ("a.json", b'{"a": 1}\n{"a": 1}', r"is not valid JSON: Extra data.*one record per line \*.jsonl"),
        ("a.json", b"[]", "without records"),
        ("a.jsonl", b"", "without records"),
        ("a.jsonl", b"\n \n", "without records"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.json", b"[{};{};{}]", "is not valid JSON"),
        ("a.json", b"[{},{};{}]", "is not valid JSON"),
        ("a.json", b"[{}]\\", "is not valid JSON"),
        ("a.json", b"\xef\xbb\xbf", "is not valid JSON"),
        ("a.jsonl", b"\xef\xbb\xbf", "without records"),
        ("a.json", b'[{},{},{},{"a":[}]', "is not valid JSON"),
        ("a.json", b"[{}" + b" " * 70 + b";{}]", "is not valid JSON"),
        ("a.parquet", b"PAR1 or not", "is not valid Parquet"),
        ("a.jsonl", b'[{"a": 1}, {"b"]', "is not valid JSON"),
        ("a.json", gzip.compress(b"[{}]", mtime=0), "is not valid JSON: gzip; decompress it"),
        ("a.jsonl.gz", gzip.compress(b"{}\n", mtime=0), "is not valid JSON: gzip; decompress it"),
        ("a.jsonl", gzip.compress(b"{}\n", mtime=0), "is not valid JSON: gzip; decompress it"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), "is not valid JSON: UTF-16 text; save it as UTF-8"),
        ("a.json", b"PAR1\0\0", "is not valid JSON: Parquet; name it"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer; run git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer; run git lfs pull"),
        ("a.json", b"\n<!DOCTYPE html>", "an HTML page; download it again"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as error:
        read_records(tmp_path / name)
    assert name in str(error.value)


def test_a_malformed_record_raises_on_access(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{]\n{}\n\xff\n")
    (tmp_path / "a.json").write_bytes(b'[{}, {"a": nul}, {}, {"\xff": 1}]')
    for name in ("a.json", "a.jsonl"):
        records = read_records(tmp_path / name)
        assert (len(records), records[0], records[2]) == (4, {}, {})
        for index in (1, 3):
            with pytest.raises(DataError, match="the record is not valid JSON"):
                records[index]


def test_gaps_of_any_width_between_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{}" + " " * 70 + ",\n{}, {}," + " " * 70 + "{}]")
    assert isinstance(read_records(tmp_path / "a.json"), JsonRecords) and len(read_records(tmp_path / "a.json")) == 4


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.floats(allow_nan=False), st.text(st.sampled_from('ab"\\/{}[],: \n\u00e9😀'))
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(st.sampled_from('a"\\{}[]')), inner)),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.dictionaries(st.text(max_size=3), JSON, max_size=3), JSON), min_size=1, max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_array_equals_json_loads(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    """Also with chunks of a few bytes, which may separate a backslash from the escaped character."""
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "_CHUNK", chunk)
        records = read_records(path)
    assert list(records) == items
    assert isinstance(records, JsonRecords if all(isinstance(item, dict) for item in items) else ListRecords)
