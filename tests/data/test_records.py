"""Validation and parsing of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.dataset_scan import image_errors
from llava.data.records import Record, Turn, parse_record, parse_turns, problems_of, quick_check
from llava.errors import DataError

GOOD: dict[str, Any] = {
    "id": 7,
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
}


def with_turns(*turns: tuple[Any, Any], image: Any = None) -> dict[str, Any]:
    record: dict[str, Any] = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    return record if image is None else {"image": image, **record}


@pytest.mark.parametrize(
    ("record", "image", "roles"),
    [
        (GOOD, ["a.png"], ["human", "gpt"]),
        ({**GOOD, "image": ["a.png"]}, ["a.png"], ["human", "gpt"]),
        (with_turns(("human", "q"), ("gpt", "a")), [], ["human", "gpt"]),
        ({**with_turns(("human", "q"), ("gpt", "a")), "image": None}, [], ["human", "gpt"]),
        (with_turns(("gpt", "hello"), ("Human", "q"), ("GPT", "a")), [], ["gpt", "human", "gpt"]),
        (with_turns(("system", "s"), ("human", "q"), ("gpt", "")), [], ["system", "human", "gpt"]),
        (
            with_turns(("system", "s"), ("gpt", "h"), ("human", "q"), ("gpt", "a")),
            [],
            ["system", "gpt", "human", "gpt"],
        ),
        (with_turns(("human", "<image> is <image>"), ("gpt", "a"), image="a"), ["a"], ["human", "gpt"]),
        (with_turns(("human", "<image><image>"), ("gpt", "a"), image=["a", "b"]), ["a", "b"], ["human", "gpt"]),
        (with_turns(("human", "q"), ("gpt", "a"), ("human", "bye")), [], ["human", "gpt", "human"]),
    ],
)
def test_good_records(record: dict[str, Any], image: list[str], roles: list[str]) -> None:
    assert list(problems_of(record)) == []
    parsed = parse_record(record)
    assert (parsed.image, [turn.role for turn in parsed.turns]) == (image, roles)


def test_parse_record() -> None:
    assert parse_record(GOOD) == Record(["a.png"], [Turn("human", "<image>\nq"), Turn("gpt", "a")])


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ([], "is list, expected an object"),
        ({}, "conversations is missing"),
        ({"conversations": []}, "conversations is missing or empty"),
        ({"conversations": "text"}, "expected a list of turns"),
        ({"conversations": ["text"]}, "expected an object with from and value"),
        (with_turns(("user", "q"), ("gpt", "a")), "from 'user', expected human, gpt, system"),
        (with_turns((None, "q"), ("gpt", "a")), "expected an object with from and value"),
        (with_turns(("human", None), ("gpt", "a")), "expected text"),
        (with_turns(("human", "\ud83d"), ("gpt", "a")), "not valid Unicode"),
        (with_turns(("human", "a"), ("human", "b")), "turn 2 is from human"),
        (with_turns(("gpt", "a"), ("gpt", "b"), ("human", "q")), "must alternate"),
        (with_turns(("human", "a")), "no gpt turn"),
        (with_turns(("gpt", "a"), ("human", "q")), "no gpt turn"),
        (with_turns(("system", "s")), "no gpt turn"),
        (with_turns(("human", "<image>"), ("gpt", "a")), "has 0 images, but its turns contain 1"),
        (with_turns(("human", "q"), ("gpt", "a"), image="a"), "has 1 images, but its turns contain 0"),
        (with_turns(("human", "<image>"), ("gpt", "a"), image=["a", "b"]), "has 2 images, .* contain 1"),
        (
            with_turns(("human", "<image>"), ("gpt", "a"), ("human", "<image>"), ("gpt", "b"), image="a"),
            "has 1 image, but 2 turns",
        ),
        (with_turns(("human", "<image>"), ("gpt", "<image>"), image=["a", "b"]), "a turn that is not human contains"),
        (with_turns(("human", "<image>"), ("gpt", "a"), image=3), "expected a path or a list of paths"),
        (with_turns(("human", "<image>"), ("gpt", "a"), image=["a", ""]), "expected a path or a list of paths"),
        (with_turns(("human", "<image>"), ("gpt", "a"), image=["a", 3]), "expected a path or a list of paths"),
        (with_turns(("human", "<image>"), ("gpt", "a"), image=""), "expected a path or a list of paths"),
        (with_turns(("human", "q"), ("gpt", "<image>"), image="a"), "a turn that is not human contains"),
    ],
)
def test_bad_records(record: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        parse_record(record)
    assert list(problems_of(record))
    assert quick_check(record) is None


def test_missing_images_are_problems(tmp_path: Path) -> None:
    assert image_errors(tmp_path, decode=False)(parse_record(GOOD)) == [f"image 'a.png' is not in {tmp_path}"]
    assert next(problems_of({**GOOD, "conversations": []})).startswith("conversations is missing")
    (tmp_path / "a.png").touch()
    assert image_errors(tmp_path, decode=False)(parse_record(GOOD)) == []


def test_parse_turns() -> None:
    assert parse_turns([{"from": "GPT", "value": "x"}]) == [Turn("gpt", "x")]
    with pytest.raises(DataError, match="a turn is from 'user'"):
        parse_turns([{"from": "user", "value": "x"}])


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.sampled_from(["human", "gpt", "<image>"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["image", "conversations", "from", "value"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_parsed_or_rejected(record: Any) -> None:
    if list(problems_of(record)):
        with pytest.raises(DataError):
            parse_record(record)
    else:
        assert isinstance(parse_record(record), Record)
