"""History of conversations, stored in the visitor's browser: its records, and reopening them."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, Field, ValidationError

from llava.conversation import get_template
from llava.errors import ImageError, RequestError, TemplateError
from llava.images import PROCESS_MODES
from llava.serve.web.chat import Chat, Sampling, Turn
from llava.serve.web.images import UploadedImage, load_image

IMAGE_BYTES: Final = 200_000  # larger images are downsized: a browser stores about 5 MB per site
_TITLE: Final = 48  # characters
_MAX_TURNS: Final = 500
_DATA_URI: Final = re.compile(r"data:image/(jpeg|mpo|png|webp);base64,")  # what `UploadedImage` holds
Text = Annotated[str, Field(max_length=1_000_000)]


class StoredTurn(BaseModel):
    """A turn of `Chat.export`, with its sampling settings."""

    text: Text
    answer: Text
    note: Text = ""
    finish_reason: Text = ""
    model: Text = ""
    mode: str = PROCESS_MODES[0]
    images: int = Field(0, ge=0)
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    max_new_tokens: int = Sampling.max_new_tokens
    max_input_tiles: int = Sampling.max_input_tiles


class StoredChat(BaseModel):
    """A conversation as the browser stores it."""

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    model: str | None = None
    template: str = Chat.template
    images: list[Text] = Field([], max_length=_MAX_TURNS)
    turns: list[StoredTurn] = Field(min_length=1, max_length=_MAX_TURNS)


class Listed(BaseModel):
    """(title, id) of the conversations in the browser, and whether the last one did not fit."""

    titles: list[tuple[str, str]]
    full: bool = False


def to_store(chat: Chat) -> str:
    """The conversation as JSON for the browser's storage, empty without an answer."""
    if not chat.turns or chat.running:
        return ""
    text = " ".join(chat.sent[0].text.split()) or "Image"
    title = text if len(text) <= _TITLE else f"{text[: _TITLE - 1]}…"
    return json.dumps({"title": title, **chat.export(image_bytes=IMAGE_BYTES)}, ensure_ascii=False)


def restore(chat: Chat, text: str) -> None:
    """Replace the turns of `chat` by a stored conversation; raises `RequestError` for anything else."""
    loaded: list[UploadedImage] = []
    try:
        stored = StoredChat.model_validate_json(text)
        get_template(stored.template)
        for uri in stored.images:
            loaded.append(_image(uri))
        images = iter(loaded)
        turns = [_turn(turn, [next(images) for _ in range(turn.images)]) for turn in stored.turns]
    except (ValidationError, ImageError, TemplateError, binascii.Error, StopIteration, RuntimeError) as error:
        for image in loaded:
            Path(image.path).unlink(missing_ok=True)
        raise RequestError("This conversation cannot be opened: its record in the browser is damaged.") from error
    chat.turns[:] = turns
    chat.chat_id, chat.model, chat.template = stored.id, stored.model, stored.template


def _turn(stored: StoredTurn, images: list[UploadedImage]) -> Turn:
    if stored.mode not in PROCESS_MODES:
        raise ImageError(f"Unknown preprocess mode {stored.mode!r}.")
    sampling = Sampling(**{field.name: getattr(stored, field.name) for field in fields(Sampling)})
    turn = Turn(stored.text, tuple(images), stored.mode, sampling, stored.model, stored.answer, stored.note)
    turn.finish_reason, turn.running = stored.finish_reason, False
    return turn


def _image(uri: str) -> UploadedImage:
    """Write a stored image to Gradio's folder, from which the browser loads it, and read it as an upload."""
    match = _DATA_URI.match(uri)
    if match is None:
        raise ImageError("A stored image is not a data URI.")
    data = base64.b64decode(uri[match.end() :], validate=True)
    folder = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.NamedTemporaryFile("wb", suffix=f".{match[1]}", dir=folder, delete=False) as file:
        file.write(data)
    try:
        image = load_image(file.name)
    except ImageError:
        Path(file.name).unlink(missing_ok=True)
        raise
    if image.path != file.name:  # converted for the browser
        Path(file.name).unlink(missing_ok=True)
    return image
