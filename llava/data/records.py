"""Validation and parsing of annotation records.

A record is `{"image": path or list of paths (optional), "conversations": [{"from": "human"|"gpt", "value": text}, …]}`;
a leading `system` turn replaces the template's system text. The layout of chat APIs and Hugging Face data sets is read,
too: `images`, and `messages` of `role` and `content`. `weight` 0 of a gpt turn excludes it from the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import DataError, shorten

ROLES: Final = ("human", "gpt", "system")
_CHAT_ROLES: Final = {"user": "human", "assistant": "gpt", "system": "system", "developer": "system"}
_WEIGHTS: Final = ("weight", "loss", "loss_mask", "train")  # keys of a turn: 0 or false excludes it from the loss
# Keys whose content would be lost, so that another function would be learned.
_MEDIA: Final = frozenset(["video", "videos", "audio", "audios"])
_REFUSED: Final = _MEDIA | {"tools", "functions", "weight"}
_REFUSED_IN_TURNS: Final = _MEDIA | {"image", "images", "tool_calls", "function_call", "reasoning_content", "mask"}
_READ: Final = frozenset(["conversations", "messages", "image", "images", "system"])
_READ_IN_TURNS: Final = frozenset(["from", "value", "role", "content", *_WEIGHTS])
_METADATA: Final = (
    "id idx index uid uuid image_id question_id sample_id conversation_id model source data_source dataset metadata "
    "dataset_name meta info task task_type type category subset split lang language license tags title topic url width "
    "height image_width image_height width_list height_list timestamp date version hash score"
)
_DESCRIPTIVE: Final = frozenset(_METADATA.split())  # of records and turns; these are not reported
COMMON_KEYS: Final = _DESCRIPTIVE | {"image", "conversations"}
_OTHER_FORMS: Final = (_READ | _REFUSED) - COMMON_KEYS
_MAX_PATH: Final = 1024  # characters
_MAX_NAME: Final = 255  # bytes of a file's name, at most 4 for a character

ImageFile = str | bytes  # a path, or the content of an image file from Parquet


class Turn(NamedTuple):
    """One turn of a conversation; `role` is one of `ROLES`. The answers that are `learned` are supervised."""

    role: str
    text: str
    learned: bool = True


@dataclass(frozen=True)
class Record:
    """A valid record: images in the order of their placeholders, and the turns."""

    image: list[ImageFile]
    turns: list[Turn]


def parse_record(raw: object) -> Record:
    """Parse a record; raises `DataError` with its first problem."""
    record, problems = _parse(raw)
    for problem in problems:
        raise DataError(problem)
    return record


def problems_of(record: object) -> Iterator[str]:
    """All problems of a record; nothing if it is valid."""
    return iter(_parse(record)[1])


def _parse(raw: object) -> tuple[Record, list[str]]:
    record = Record([], [])
    if not isinstance(raw, Mapping):
        return record, [f"the record is {type(raw).__name__}, expected an object"]
    try:
        record.image.extend(_images(raw))
        turns = _conversation(raw)
    except DataError as error:
        return record, [str(error.args[0])]
    images = len(record.image)
    problems = [f"the record has {key}, which is not supported" for key in _refused(raw, _REFUSED)]
    for turn in turns:
        try:
            record.turns.append(_parse_turn(turn, record.image))
        except DataError as error:
            problems.append(str(error.args[0]))
    if 0 < images < len(record.image):
        problems.append("the record has images beside those of its messages, expected them in one place")
    system = raw.get("system") or None
    if system is not None and (not isinstance(system, str) or [turn.role for turn in record.turns[:1]] == ["system"]):
        problems.append(f"system is {shorten(system)!r}, expected text, and no system turn beside it")
    elif system is not None:
        record.turns.insert(0, Turn("system", system))
    if not problems:
        problems = [*_order_problems(record.turns), *_placeholder_problems(record.turns, len(record.image))]
    return record, problems


def _refused(keys: Mapping[str, Any], refused: frozenset[str]) -> list[str]:
    """The `refused` keys that hold something; a `weight` of 1 changes nothing."""
    held = {key: keys[key] for key in sorted(refused.intersection(keys))}
    return [key for key, value in held.items() if (value not in (None, 1) if key == "weight" else value)]


def _images(raw: Mapping[str, Any]) -> list[ImageFile]:
    given = {key: raw[key] for key in ("image", "images") if raw.get(key) not in (None, [])}
    if len(given) > 1:
        raise DataError("the record has both image and images, expected one of them")
    key, value = next(iter(given.items()), ("image", []))
    return [_image(item, key) for item in (value if isinstance(value, list) else [value])]


def _image(item: object, key: str) -> ImageFile:
    """A path, or an image of a Hugging Face data set, `{"bytes": …, "path": …}`."""
    if isinstance(item, Mapping) and item.keys() == {"bytes", "path"}:
        item = item["bytes"] or item["path"]
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str) or not item:
        raise DataError(f"{key} is {shorten(item)!r}, expected a path or a list of paths")
    if not _is_path(item):
        raise DataError(f"{key} is {shorten(item)!r}, expected the path of a file, not its content or URL")
    return item


def _is_path(text: str) -> bool:
    """False for URLs, data URIs and base64, which is longer than paths or has longer pieces between slashes."""
    if text.startswith("data:") or "://" in text or len(text) > _MAX_PATH:
        return False
    names = text.split("/") if 4 * len(text) > _MAX_NAME else ()
    return all(len(name.encode("utf-8", "replace")) <= _MAX_NAME for name in names)


def _conversation(raw: Mapping[str, Any]) -> list[Any]:
    given = [key for key in ("conversations", "messages") if raw.get(key)]
    if len(given) > 1:
        raise DataError("the record has both conversations and messages, expected one of them")
    if not given:
        raise DataError("conversations is missing or empty, expected a list of turns")
    if not isinstance(raw[given[0]], list):
        raise DataError(f"{given[0]} is {shorten(raw[given[0]])!r}, expected a list of turns")
    return list(raw[given[0]])


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
        if not _OTHER_FORMS.isdisjoint(raw) or sum(map(len, turns)) != 2 * len(turns):
            return None
        if image is None:
            return None if placeholders else (text, False)
        matches = placeholders == 1 and isinstance(image, str) and image and DEFAULT_IMAGE_TOKEN in turns[0]["value"]
        return (text, True) if matches and _is_path(image) else None
    except (TypeError, KeyError, AttributeError):
        return None


def unused_keys(raw: Mapping[str, Any]) -> set[str]:
    """Keys of a record, and of its turns as `turn.KEY`, that are neither read nor refused nor known to describe it."""
    found = {str(key) for key in raw.keys() - COMMON_KEYS - _READ - _REFUSED}
    turns = raw.get("conversations") or raw.get("messages")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping):
            keys = turn.keys() - _READ_IN_TURNS - _REFUSED_IN_TURNS - _DESCRIPTIVE
            found |= {f"turn.{key}" for key in keys if turn[key] is not None}  # Parquet fills absent keys
    return found


def has_image(raw: object) -> bool:
    """Whether a record, valid or not, names an image."""
    return isinstance(raw, Mapping) and bool(
        raw.get("image") or raw.get("images") or (raw.get("messages") and _parse(raw)[0].image)
    )


def parse_turns(conversations: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Parse a `conversations` list; raises `DataError` for an unknown role or a value that is not text."""
    return [_parse_turn(turn, []) for turn in conversations]


def drop_greeting(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Drop a first turn that is not human."""
    return turns[1:] if turns and turns[0].role != "human" else turns


def _parse_turn(turn: Any, images: list[ImageFile]) -> Turn:
    """A turn of either layout; images among its content are added to `images`."""
    is_chat = isinstance(turn, Mapping) and "from" not in turn
    role_key, text_key = ("role", "content") if is_chat else ("from", "value")
    named = turn.get(role_key) if isinstance(turn, Mapping) else None
    if not isinstance(named, str):
        raise DataError(f"a turn is {shorten(turn)!r}, expected an object with from and value")
    roles = _CHAT_ROLES if is_chat else {role: role for role in ROLES}
    role = roles.get(named.lower())
    if role is None:
        raise DataError(f"a turn is from {shorten(named)!r}, expected {', '.join(roles)}")
    if refused := _refused(turn, _REFUSED_IN_TURNS):
        raise DataError(f"a turn from {named} has {', '.join(refused)}, which is not supported")
    text = turn.get(text_key)
    if is_chat and isinstance(text, list):
        text = "\n".join(_part(part, images) for part in text)
    if not isinstance(text, str):
        raise DataError(f"a turn from {named} has the value {shorten(text, 40)!r}, expected text")
    if not _is_unicode(text):
        raise DataError(f"a turn from {named} is not valid Unicode")
    return Turn(role, text, _is_learned(turn, role))


def _part(part: Any, images: list[ImageFile]) -> str:
    """The text of a part of `content`; an image gives its placeholder, and joins `images` if the part names it."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind != "image":
        raise DataError(f"a part of a message is {shorten(part)!r}, expected one of type text or image")
    if (image := part.get("image")) is not None:
        images.append(_image(image, "image"))
    return DEFAULT_IMAGE_TOKEN


def _is_learned(turn: Mapping[str, Any], role: str) -> bool:
    learned = True
    for key in _WEIGHTS:
        if (value := turn.get(key)) is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"a turn has the {key} {shorten(value)!r}, expected 0 or 1")
        if value and role != "gpt":
            raise DataError(f"a turn from {role} has the {key} {value}, but only answers are learned")
        learned &= bool(value)
    return learned


def _is_unicode(text: str) -> bool:
    """False for unpaired surrogates, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _order_problems(turns: list[Turn]) -> Iterator[str]:
    turns = list(drop_greeting(turns[1:] if turns[0].role == "system" else turns))
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            yield f"turn {index + 1} is from {turn.role}, but human and gpt turns must alternate"
            return
    if not any(turn.role == "gpt" for turn in turns):
        yield "the record has no gpt turn, expected at least one"


def _placeholder_problems(turns: list[Turn], images: int) -> Iterator[str]:
    counts = [turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns if turn.role == "human"]
    total = sum(counts)
    if any(DEFAULT_IMAGE_TOKEN in turn.text for turn in turns if turn.role != "human"):
        yield f"a turn that is not human contains {DEFAULT_IMAGE_TOKEN}"
    elif images == 1 and total >= 1:
        # Several placeholders of a single image in one turn are reduced to one, see `labels.place_images`.
        if sum(map(bool, counts)) > 1:
            yield f"the record has 1 image, but {sum(map(bool, counts))} turns contain {DEFAULT_IMAGE_TOKEN}"
    elif images != total:
        yield f"the record has {images} images, but its turns contain {total} {DEFAULT_IMAGE_TOKEN}"
