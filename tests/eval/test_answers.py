"""Answers files: question order, resumption after an interruption at any byte, and validation."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.errors import DataError
from llava.eval.run.answers import AnswersWriter, answer_id, answer_row, complete_answers, read_answers
from llava.eval.run.questions import Question

QUESTIONS = [Question(number // 2, f"question {number} ü", ("x.png",)) for number in range(12)]
MAKE = partial(answer_row, "model")


def write(path: Path, order: list[int], *, failing: frozenset[int] = frozenset(), complete: bool = True) -> None:
    """Write the unfinished answers in `order`."""
    writer = AnswersWriter(path, QUESTIONS)
    for at in order:
        if at not in writer.finished:
            failed = at in failing
            writer.write(at, MAKE(QUESTIONS[at], "" if failed else f"answer {at}", "broken" if failed else None))
    writer.close(complete=complete)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    write(path, list(range(12)))
    return path.read_bytes()


def test_record_has_the_published_keys_in_order(expected: bytes) -> None:
    row = json.loads(expected.split(b"\n")[3])
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (row["question_id"], row["prompt"], row["text"], row["metadata"]) == (1, "question 3 ü", "answer 3", {})
    assert len(row["answer_id"]) == 22


def test_answer_ids_depend_on_content_only() -> None:
    assert answer_id("m", 1, "q", "a") == answer_id("m", 1, "q", "a")
    assert len({answer_id("m", 1, "q", "a"), answer_id("m", "1", "q", "a"), answer_id("m", 1, "q", "b")}) == 3


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(12)), cut=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_killed_at_any_byte_and_resumed(
    tmp_path_factory: pytest.TempPathFactory, expected: bytes, order: list[int], cut: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("killed") / "answers.jsonl"
    path.write_bytes(expected[: cut % (len(expected) + 1)])
    write(path, order, complete=False)
    assert path.read_bytes() == expected
    random.Random(seed).shuffle(order)
    write(path, order)
    assert path.read_bytes() == expected


def test_rows_are_flushed_in_question_order(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    writer = AnswersWriter(path, QUESTIONS)
    for at, lines in ((1, 0), (0, 2), (3, 2), (2, 4)):
        writer.write(at, MAKE(QUESTIONS[at], f"answer {at}", None))
        assert path.read_bytes() == b"".join(expected.splitlines(keepends=True)[:lines])
    writer.close(complete=False)


def test_failures_are_marked_and_retried(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, list(range(12)), failing=frozenset({2, 7}))
    failed = path.read_bytes()
    row = json.loads(failed.split(b"\n")[7])
    assert row["text"] == "" and row["metadata"] == {"error": "broken"}
    with pytest.raises(DataError, match="12 of 12 answers, 2 of them failed; not scored"):
        complete_answers(path, QUESTIONS)
    writer = AnswersWriter(path, QUESTIONS)
    writer.close(complete=False)
    assert set(range(12)) - writer.finished == {2, 7}
    write(path, [7], complete=False)  # interrupted before all were retried
    assert path.read_bytes() == failed
    write(path, [7, 2])
    assert path.read_bytes() == expected and len(complete_answers(path, QUESTIONS)) == 12
    assert list(tmp_path.iterdir()) == [path]


def test_missing_rows_are_not_scored(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, list(range(11)), complete=False)
    with pytest.raises(DataError, match="11 of 12"):
        complete_answers(path, QUESTIONS)


def change(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    match what:
        case "prompt":
            rows[3]["prompt"] = "another"
        case "id type":
            rows[3]["question_id"] = str(rows[3]["question_id"])
        case "order":
            rows[3], rows[4] = rows[4], rows[3]
        case "more":
            rows.append(rows[-1])
        case "key":
            del rows[3]["prompt"]
    return rows


@pytest.mark.parametrize("what", ["prompt", "id type", "order", "more", "key"])
def test_answers_to_other_questions_are_refused(tmp_path: Path, expected: bytes, what: str) -> None:
    path = tmp_path / "answers.jsonl"
    rows = change([json.loads(line) for line in expected.splitlines()], what)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 4|more rows than the 12"):
        read_answers(path, QUESTIONS)


def test_a_malformed_line_is_refused(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    lines = expected.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{torn\n", *lines[3:]]))
    with pytest.raises(DataError, match="line 3 is not an answer record"):
        AnswersWriter(path, QUESTIONS)
