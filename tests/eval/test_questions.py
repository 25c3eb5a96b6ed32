"""Question files, chunks and evenly spaced subsets."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks import science_qa
from llava.eval.run.files import read_json
from llava.eval.run.questions import (
    Question,
    get_chunk,
    read_questions,
    split_list,
    subsample,
)


@pytest.mark.parametrize(
    ("items", "chunks", "sizes"),
    [
        (5, 4, [2, 2, 1, 0]),
        (10, 8, [2] * 5 + [0] * 3),
        (9, 6, [2, 2, 2, 2, 1, 0]),
        (100, 8, [13] * 7 + [9]),
        (60, 8, [8] * 7 + [4]),
        (3, 8, [1] * 3 + [0] * 5),
        (0, 3, [0, 0, 0]),
    ],
)
def test_chunk_sizes(items: int, chunks: int, sizes: list[int]) -> None:
    assert [len(chunk) for chunk in split_list(range(items), chunks)] == sizes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(items=st.lists(st.integers(), max_size=50), chunks=st.integers(1, 60))
def test_chunks_join_to_the_whole(items: list[int], chunks: int) -> None:
    assert [item for k in range(chunks) for item in get_chunk(items, chunks, k)] == items


@pytest.mark.parametrize(("n", "k"), [(0, 0), (2, 2), (2, -1)])
def test_impossible_chunks_are_refused(n: int, k: int) -> None:
    with pytest.raises(ConfigError):
        get_chunk([1, 2], n, k)


@given(total=st.integers(1, 500), limit=st.integers(1, 500))
def test_a_subsample_is_evenly_spaced(total: int, limit: int) -> None:
    chosen = list(subsample(range(total), limit))
    assert len(chosen) == min(limit, total) == len(set(chosen)) and chosen[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        subsample([1, 2], 0)


def test_byte_order_marks_and_crlf_are_read(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = '{"question_id": 1, "text": "a"}\r\n\r\n{"question_id": 2, "text": "ü"}'
    file.write_text(rows, encoding="utf-8-sig", newline="")
    assert read_questions(file) == [Question(1, "a"), Question(2, "ü")]
    file.write_text('[{"id": "1", "conversations": [{"value": "a"}]}]', encoding="utf-8-sig")
    assert science_qa.read_questions(file)[0].prompt == "a" and read_json(file)[0]["id"] == "1"


def test_question_file(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question_id": "a/b", "image": "x.jpg", "text": "Why?\\nAnswer.", "category": "c"}\n\n'
        '{"question_id": 7, "text": "And?"}\n{"question_id": 7, "image": ["1.png", "2.png"], "text": "Both?"}\n'
    )
    assert read_questions(file) == [
        Question("a/b", "Why?\nAnswer.", ("x.jpg",)),
        Question(7, "And?"),
        Question(7, "Both?", ("1.png", "2.png")),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id"', "line 2 is not JSON"),
        ('{"question_id": 1}', "line 1 is missing text; found question_id"),
        ('{"text": "a"}', "line 1 is missing question_id; found text"),
        ("[1]", "line 1 is a list"),
        ('{"question_id": 1, "text": null}', "line 1 has a text or an image that is not a string"),
        ('{"question_id": 1, "text": "a", "image": 5}', "line 1 has a text or an image that is not a string"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(file)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
