"""What a record is, and exactly what is wrong with one that is not (spec/train.md §3.1).

A record is `{"image": path or list of paths (optional), "conversations": [{"from": "human"|"gpt", "value": text}, …]}`;
a leading `system` turn replaces the template's system text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def problems_of(raw: object) -> list[str]:
    """Everything that is wrong with a record; nothing when it can be trained on."""
    return list(_problems(raw))


def parse_record(raw: object) -> Record:
    """The record in its normal form; raises `DataError` with the first problem."""
    for problem in _problems(raw):
        raise DataError(problem)
    assert isinstance(raw, Mapping)
    return Record(image_paths(raw), [Turn(turn["from"].lower(), turn["value"]) for turn in raw["conversations"]])


def glance(raw: Any) -> tuple[str, bool] | None:
    """All text of a record, and whether it has an image, if it is good and of the common kind; else None.

    The common kind has pairs of human and gpt and at most one image, named once in the first turn.
    """
    try:
        turns, image = raw["conversations"], raw.get("image")
        roles = [turn["from"] for turn in turns]
        text = "\n".join([turn["value"] for turn in turns])
        named = text.count(DEFAULT_IMAGE_TOKEN)
        if not _is_unicode(text) or not roles or roles != ["human", "gpt"] * (len(roles) // 2):
            return None
        if image is None:
            return None if named else (text, False)
        fits = named == 1 and isinstance(image, str) and bool(image) and DEFAULT_IMAGE_TOKEN in turns[0]["value"]
        return (text, True) if fits else None
    except (TypeError, KeyError, AttributeError):
        return None


def validate_record(record: object, index: int, image_folder: str | Path | None = None) -> list[str]:
    """Every problem of a record as `index: what is wrong`; with `image_folder`, missing image files too."""
    problems = list(_problems(record))
    if not problems and image_folder is not None and isinstance(record, Mapping):
        missing = [path for path in image_paths(record) if not (Path(image_folder) / path).is_file()]
        problems = [f"image {path!r} is not in {image_folder}" for path in missing]
    return [f"{index}: {problem}" for problem in problems]


def image_paths(record: Mapping[str, Any]) -> list[str]:
    """The images a record declares; none when the key is absent or null."""
    image = record.get("image")
    return [image] if isinstance(image, str) else list(image or ())


def parse_turns(conversations: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Turns of a `conversations` list; raises `DataError` for an unknown role or a value that is not text."""
    for turn in conversations:
        for problem in _turn_problems(turn):
            raise DataError(problem)
    return [Turn(turn["from"].lower(), turn["value"]) for turn in conversations]


def drop_greeting(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Turns without a leading one that is not human; a second one breaks the alternation (spec/train.md §4.2)."""
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
    """False for half of a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problems(record: object) -> Iterator[str]:
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
    faults = [problem for turn in turns for problem in _turn_problems(turn)]
    yield from faults
    if not faults:
        parsed = [Turn(turn["from"].lower(), turn["value"]) for turn in turns]
        yield from _order_problems(parsed)
        yield from _placeholder_problems(parsed, len(paths))


def _order_problems(turns: list[Turn]) -> Iterator[str]:
    turns = list(drop_greeting(turns[1:] if turns[0].role == "system" else turns))
    for index, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[index % 2]:
            yield f"turn {index + 1} is from {role}, but human and gpt turns must alternate"
            return
    if not any(role == "gpt" for role, _ in turns):
        yield "there is no gpt turn to learn from"


def _placeholder_problems(turns: list[Turn], images: int) -> Iterator[str]:
    counts = [text.count(DEFAULT_IMAGE_TOKEN) for role, text in turns if role == "human"]
    total = sum(counts)
    if any(DEFAULT_IMAGE_TOKEN in text for role, text in turns if role != "human"):
        yield f"{DEFAULT_IMAGE_TOKEN} stands in a turn that is not human"
    elif images == 1 and total >= 1:
        # One image named several times in one turn counts once (spec/train.md §4.1).
        if sum(map(bool, counts)) > 1:
            yield f"1 image is declared, but {sum(map(bool, counts))} turns hold {DEFAULT_IMAGE_TOKEN}"
    elif images != total:
        yield f"{images} images are declared, but the turns hold {total} {DEFAULT_IMAGE_TOKEN}"
