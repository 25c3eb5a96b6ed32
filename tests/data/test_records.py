"""Validation and parsing of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.dataset_scan import image_errors
from llava.data.records import Record, Turn, parse_record, parse_turns, problems_of, quick_check, unused_keys
from llava.errors import DataError

GOOD: dict[str, Any] = {
    "id": 7,
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
}


PART = {"type": "image", "image": "p"}


def chat(*turns: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Messages of the layout of chat APIs; `more` goes to the last."""
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1].update(more)
    return messages


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
        (
            {**GOOD, "images": [], "video": None, "tools": [], "messages": None, "weight": 1},
            ["a.png"],
            ["human", "gpt"],
        ),
        ({**with_turns(("human", "<image>"), ("gpt", "a")), "images": ["a"]}, ["a"], ["human", "gpt"]),
        ({**with_turns(("human", "q"), ("gpt", "a")), "system": "s"}, [], ["system", "human", "gpt"]),
        ({**GOOD, "image": {"bytes": b"x", "path": "a.png"}}, [b"x"], ["human", "gpt"]),
        ({**GOOD, "image": [{"bytes": None, "path": "a.png"}]}, ["a.png"], ["human", "gpt"]),
        ({"messages": chat(("system", "s"), ("user", "q"), ("assistant", "a"))}, [], ["system", "human", "gpt"]),
        ({"conversations": chat(("User", "q"), ("assistant", "a"))}, [], ["human", "gpt"]),
        (
            {"messages": chat(("user", [PART, {"type": "text", "text": "q"}]), ("assistant", "a"))},
            ["p"],
            ["human", "gpt"],
        ),
        ({"image": "long/" * 50 + "a.png", **with_turns(("human", "<image>"), ("gpt", "a"))}, None, ["human", "gpt"]),
    ],
)
def test_good_records(record: dict[str, Any], image: list[str], roles: list[str]) -> None:
    assert list(problems_of(record)) == []
    parsed = parse_record(record)
    assert [turn.role for turn in parsed.turns] == roles and (image is None or parsed.image == image)
    assert all(turn.learned for turn in parsed.turns)


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
        ({**GOOD, "image": "A" * 10_759}, r"^image is 'A{60}… \(10759 characters\)', expected the path of a file, not"),
        (
            {**GOOD, "image": "data:image/png;base64,iVBORw0KGgo="},
            "expected the path of a file, not its content or URL",
        ),
        ({**GOOD, "image": "https://example.org/a.png"}, "expected the path of a file, not its content or URL"),
        ({**GOOD, "image": "file:///a.png"}, "expected the path of a file, not its content or URL"),
        ({**GOOD, "image": b""}, "expected a path or a list of paths"),
        ({**GOOD, "conversations": '[{"from": "human"}]'}, "conversations is '.*', expected a list of turns"),
        ({**GOOD, "images": ["b.png"]}, "both image and images"),
        ({**GOOD, "messages": chat(("user", "q"))}, "both conversations and messages"),
        ({**GOOD, "video": "a.mp4"}, "the record has video, which is not supported"),
        ({**GOOD, "weight": 0}, "the record has weight, which is not supported"),
        ({**GOOD, "system": ["s"]}, "system is .* expected text"),
        ({**with_turns(("system", "s"), ("human", "q"), ("gpt", "a")), "system": "t"}, "no system turn beside it"),
        ({"messages": chat(("user", "q"), ("assistant", "a"), weight=0.5)}, "has the weight '0.5', expected 0 or 1"),
        ({"messages": chat(("user", "q"), ("assistant", "a"), loss="no")}, "has the loss 'no', expected 0 or 1"),
        ({"messages": chat(("assistant", "a"), ("user", "q"), weight=1)}, "only answers are learned"),
        ({"messages": chat(("user", "q"), ("assistant", None), tool_calls=[1])}, "has tool_calls, which is not supp"),
        ({"messages": chat(("user", "q"), ("tool", "a"))}, "from 'tool', expected user, assistant, system"),
        ({"messages": chat(("user", [{"type": "video"}]), ("assistant", "a"))}, "expected one of type text or image"),
        ({"messages": chat(("user", [PART]), ("assistant", "a")), "images": ["a"]}, "expected them in one place"),
        ({"messages": chat(("user", [PART, PART]), ("assistant", "<image>"))}, "a turn that is not human contains"),
    ],
)
def test_bad_records(record: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        parse_record(record)
    assert list(problems_of(record))
    assert quick_check(record) is None


@pytest.mark.parametrize("key", ["weight", "loss", "train", "loss_mask"])
def test_turns_of_weight_0_are_not_learned(key: str) -> None:
    for value, learned in ((0, False), (False, False), (0.0, False), (1, True), (True, True), (None, True)):
        record = parse_record({"messages": chat(("user", "q"), ("assistant", "a"), **{key: value})})
        assert record.turns == [Turn("human", "q"), Turn("gpt", "a", learned)]


def test_keys_that_are_not_used_are_named() -> None:
    record = {**GOOD, "source": "x", "width": 3, "captions": [], "messages": None, "video": None}
    record["conversations"] = [{**turn, "lang": "en", "name": None, "notes": ""} for turn in GOOD["conversations"]]
    assert unused_keys(record) == {"captions", "turn.notes"}
    assert not list(problems_of(record))
    assert unused_keys({**GOOD, "conversations": 3}) == set()


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
