"""Scans of whole files: equal results inline and in processes, and problems that reach training."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data import dataset as datasets
from llava.data import dataset_scan
from llava.data.annotations import read_records
from llava.data.dataset_scan import DatasetScan, count_words
from llava.errors import DataError
from tests.data.test_dataset import arguments, record, tokenizer

RECORDS: list[Any] = [
    record("two words", "yes no"),
    record("<image> a", image="red.png"),
    {"conversations": []},
    record("<image>", image="nowhere.png"),
    record("<image><image>", image=["red.png", "broken.png"]),
    {**record("hi"), "extra": 1},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.new("RGB", (9, 5), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:45])
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return tmp_path / "data.json"


@pytest.mark.parametrize("workers", [None, 1, 4, 9])
def test_findings(file: Path, workers: int | None) -> None:
    found = DatasetScan(read_records(file), workers=workers).result()
    assert found.words.tolist() == [4, 3, 0, 2, 2, 2]
    assert found.image.tolist() == [False, True, False, True, True, False]
    assert found.keys == {"extra": (1, 5)}
    assert found.problems == {2: ["conversations is missing or empty, expected a list of turns"]}


BLANKS = "\t\n\x0b\x0c\r\x1c\x1f \x85\xa0\u1680\u2003\u2028\u3000"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from(BLANKS + "\x00\x08\x0e\x1b\x7f!aé’中😀")), max_size=6))
def test_words_are_counted_as_python_splits(texts: list[str]) -> None:
    assert count_words(texts).tolist() == [len(text.split()) for text in texts]


def test_images_are_checked_for_existence_or_decoded(file: Path) -> None:
    records = read_records(file)
    exist = DatasetScan(records, images=file.parent, workers=2).result().problems
    decoded = DatasetScan(records, images=file.parent, decode=True, workers=2).result().problems
    assert sorted(exist) == [2, 3] and "is not in" in exist[3][0]
    assert sorted(decoded) == [2, 3, 4]
    assert "no such file" in decoded[3][0] and "damaged or incomplete" in decoded[4][0]


def test_parquet_in_processes(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([RECORDS[1], RECORDS[0]]), tmp_path / "a.parquet")
    assert DatasetScan(read_records(tmp_path / "a.parquet"), workers=2).result().words.tolist() == [3, 4]


def test_records_that_are_not_objects_have_no_keys(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([3, "ab", record("hi")]))
    found = DatasetScan(read_records(tmp_path / "a.json")).result()
    assert found.keys == {} and sorted(found.problems) == [0, 1]


def test_only_the_owner_of_a_scan_cleans_up(tmp_path: Path) -> None:
    """Data loader workers hold copies of it."""
    dataset_scan._clean_up(os.getpid() + 1, [], tmp_path)
    assert tmp_path.is_dir()
    dataset_scan._clean_up(os.getpid(), [], tmp_path)
    assert not tmp_path.exists()


def test_a_process_that_dies_is_an_error(file: Path) -> None:
    running = DatasetScan(read_records(file), workers=2)
    (file.parent / "data.json").write_text("[")  # for processes that have not read it yet
    running._running[0].kill()
    with pytest.raises(DataError, match=r"data.json ended with status -9"):
        running.result()


def test_a_copy_for_another_process_never_waits(file: Path) -> None:
    running = DatasetScan(read_records(file), workers=1)
    assert pickle.loads(pickle.dumps(running)).ready()  # noqa: S301 - our own
    limit = time.monotonic() + 120
    while not running.ready():  # by itself, before anyone asks for the result
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert running.result().words[0] == 4


def test_training_starts_before_the_scan_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_scan, "INLINE_RECORDS", 0)
    strict = datasets.LazySupervisedDataset(str(file), tokenizer(), arguments(file), "v1")
    with pytest.raises(DataError, match="record 2: conversations is missing"):
        strict.check(wait=True)
    skipping = datasets.LazySupervisedDataset(str(file), tokenizer(), arguments(file, on_bad_sample="skip"), "v1")
    assert len(skipping[2]["input_ids"]) and skipping.lengths == [4, 131, 0, 130, 130, 2]
    assert skipping.modality_lengths == [-4, 3, 0, 2, 2, -2]
    assert skipping.check() and skipping.report()["bad"] == 1
