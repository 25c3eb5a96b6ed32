"""Validation and parsing of annotation records.

A record is `{"image": path or list of paths (optional), "conversations": [{"from": "human"|"gpt", "value": text}, …]}`;
a leading `system` turn replaces the template's system text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import DataError

ROLES: Final = ("human", "gpt", "system")


class Turn(NamedTuple):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """A valid record: image paths in the order of their placeholders, and the turns."""

    image: list[str]
    turns: list[Turn]


def parse_record(raw: object) -> Record:
    """Parse a record; raises `DataError` with its first problem."""
    for problem in problems_of(raw):
        raise DataError(problem)
    assert isinstance(raw, Mapping)
    image = raw.get("image")
    paths = [image] if isinstance(image, str) else list(image or ())
    return Record(paths, [Turn(turn["from"].lower(), turn["value"]) for turn in raw["conversations"]])


def problems_of(record: object) -> Iterator[str]:
    """All problems of a record; nothing if it is valid."""
    if not isinstance(record, Mapping):
        yield f"the record is {type(record).__name__}, expected an object"
        return
    image, turns = record.get("image"), record.get("conversations")
    paths = [image] if isinstance(image, str) else image or []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        yield f"image is {str(image)[:60]!r}, expected a path or a list of paths"
        return
    if not isinstance(turns, list) or not turns:
        yield "conversations is missing or empty, expected a list of turns"
        return
    problems = [problem for turn in turns for problem in _turn_problems(turn)]
    yield from problems
    if not problems:
        parsed = [Turn(turn["from"].lower(), turn["value"]) for turn in turns]
        yield from _order_problems(parsed)
        yield from _placeholder_problems(parsed, len(paths))


def quick_check(raw: Any) -> tuple[str, bool] | None:
    """Text and presence of an image of a valid record in the common form; None for any other record.

    The common form has pairs of human and gpt turns and at most one image, with one placeholder in the first turn.
    """
    try:
        turns, image = raw["conversations"], raw.get("image")
        roles = [turn["from"] for turn in turns]
        text = "\n".join([turn["value"] for turn in turns])
        placeholders = text.count(DEFAULT_IMAGE_TOKEN)
        if not _is_unicode(text) or not roles or roles != ["human", "gpt"] * (len(roles) // 2):
            return None
        if image is None:
            return None if placeholders else (text, False)
        matches = placeholders == 1 and isinstance(image, str) and image and DEFAULT_IMAGE_TOKEN in turns[0]["value"]
        return (text, True) if matches else None
    except (TypeError, KeyError, AttributeError):
        return None


def parse_turns(conversations: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Parse a `conversations` list; raises `DataError` for an unknown role or a value that is not text."""
    for turn in conversations:
        for problem in _turn_problems(turn):
            raise DataError(problem)
    return [Turn(turn["from"].lower(), turn["value"]) for turn in conversations]


def drop_greeting(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Drop a first turn that is not human."""
    return turns[1:] if turns and turns[0].role != "human" else turns


def _turn_problems(turn: object) -> Iterator[str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        yield f"a turn is {str(turn)[:60]!r}, expected an object with from and value"
    elif turn["from"].lower() not in ROLES:
        yield f"a turn is from {turn['from']!r}, expected {', '.join(ROLES)}"
    elif not isinstance(turn.get("value"), str):
        yield f"a turn from {turn['from']} has the value {str(turn.get('value'))[:40]!r}, expected text"
    elif not _is_unicode(turn["value"]):
        yield f"a turn from {turn['from']} is not valid Unicode"


def _is_unicode(text: str) -> bool:
    """False for unpaired surrogates, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _order_problems(turns: list[Turn]) -> Iterator[str]:
    turns = list(drop_greeting(turns[1:] if turns[0].role == "system" else turns))
    for index, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[index % 2]:
            yield f"turn {index + 1} is from {role}, but human and gpt turns must alternate"
            return
    if not any(role == "gpt" for role, _ in turns):
        yield "the record has no gpt turn, expected at least one"


def _placeholder_problems(turns: list[Turn], images: int) -> Iterator[str]:
    counts = [text.count(DEFAULT_IMAGE_TOKEN) for role, text in turns if role == "human"]
    total = sum(counts)
    if any(DEFAULT_IMAGE_TOKEN in text for role, text in turns if role != "human"):
        yield f"a turn that is not human contains {DEFAULT_IMAGE_TOKEN}"
    elif images == 1 and total >= 1:
        # Several placeholders of a single image in one turn are reduced to one, see `labels.place_images`.
        if sum(map(bool, counts)) > 1:
            yield f"the record has 1 image, but {sum(map(bool, counts))} turns contain {DEFAULT_IMAGE_TOKEN}"
    elif images != total:
        yield f"the record has {images} images, but its turns contain {total} {DEFAULT_IMAGE_TOKEN}"
