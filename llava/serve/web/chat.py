"""State of a conversation in the browser: turns, prompt, chat view and export."""

from __future__ import annotations

import asyncio
import html
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Final, cast

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Content, Conversation, get_template, with_image_token
from llava.errors import RequestError
from llava.serve.web.images import UploadedImage

JsonObject = dict[str, object]
CURSOR: Final = "▌"
SKELETON: Final = '<div class="skeleton" role="status" aria-label="Reading the message"><i></i><i></i><i></i></div>'
# Fenced blocks, also in lists and quotes; code spans, as in CommonMark; formulas.
_LITERAL: Final = re.compile(
    r"^(?:[ \t>]|[-*+] |\d+[.)] )*(?P<fence>`{3,}|~{3,})[^`\n]*(?:\n(?:.*?\n)??[ \t>]*(?P=fence)[`~]*[ \t]*$|\n?.*\Z)"
    r"|(?<![\\`])(?P<run>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=run)(?!`)"
    r"|(?P<math>\$\$.+?\$\$|(?<!\\)\\\[(?:(?!\\\[).)+?\\\]|(?<!\\)\\\((?:(?!\\\().)+?\\\))",
    re.DOTALL | re.MULTILINE,
)
_RUN: Final = re.compile("`+")
_MAX_KINDS: Final = 16  # lengths of runs of backticks; `_LITERAL` looks for the end of every kind
# Tags, code and images, with the backslashes before them.
_MARKUP: Final = re.compile(r"(\\*)([&<>`]|!(?=\[))")
_MATH_MARK: Final = "\u2060"  # word joiner: marks formulas found by `escape`, so that those in code are not rendered
# Delimiters of formulas in the chat view, with the marks.
LATEX_DELIMITERS: Final[list[dict[str, str | bool]]] = [
    {"left": f"{_MATH_MARK}$$", "right": f"$${_MATH_MARK}", "display": True},
    {"left": f"{_MATH_MARK}\\[", "right": f"\\]{_MATH_MARK}", "display": True},
    {"left": f"{_MATH_MARK}\\(", "right": f"\\){_MATH_MARK}", "display": False},
]
_NAMED: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Characters that Markdown gives a meaning, alone or in an address that it turns into a link.
_ACTIVE: Final = re.compile(r"[&<>\\`*_\[\]!#+\-=~|$:@\n\t]|(?<=www)\.|(?<!\S) |^\d+[.)]")


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a turn, from the sliders."""

    temperature: float = 0.8
    top_p: float = 0.7
    max_new_tokens: int = 1024
    max_input_tiles: int = 12


@dataclass
class Turn:
    """A message, its images and its answer. `note` explains a missing or incomplete answer and is never sent."""

    text: str
    images: tuple[UploadedImage, ...] = ()
    mode: str = "Default"
    sampling: Sampling = Sampling()
    model: str = ""
    answer: str = ""
    note: str = ""
    finish_reason: str = ""
    running: bool = True
    vote: str = ""
    started: float = field(default_factory=time.time)
    turn_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def answered(self) -> bool:
        """Whether there is an answer, which may have been stopped or cut off, but has not failed."""
        return bool(self.answer) and not self.running and self.finish_reason != "error"

    def shown(self, name: str | None = None) -> list[str]:
        """Markdown of the answer: the model's name, the text, and a card with the note."""
        note = self.note.replace(self.model, name) if name and self.model else self.note
        parts = [f'<span class="model-name">{verbatim(name or self.model)}</span>']
        if self.answer:
            parts.append(escape(self.answer) + (CURSOR if self.running else ""))
        elif self.running:
            parts.append(SKELETON)
        if note and self.finish_reason == "error":
            what, _, details = note.partition(". (")
            what, _, remedy = what.rstrip(".").partition("; ")
            lines = [f"<strong>{verbatim(what)}.</strong>"]
            lines += [f"<p>{verbatim(remedy[:1].upper() + remedy[1:])}.</p>"] if remedy else []
            lines += [f"<small>({verbatim(details)}</small>"] if details else []
            parts.append(f'<div class="error-card" role="alert">{"".join(lines)}</div>')
        elif note:
            parts.append(f'<div class="note">{verbatim(note)}</div>')
        return parts

    def check(self) -> None:
        """Raise `RequestError` when the number of placeholders in the text differs from the number of images."""
        typed = self.text.count(DEFAULT_IMAGE_TOKEN)
        if typed and typed != len(self.images):
            raise RequestError(
                f"The text has {typed} {DEFAULT_IMAGE_TOKEN} placeholder(s) but {len(self.images)} image(s) attached; "
                f"omit {DEFAULT_IMAGE_TOKEN}, or write it once for each image."
            )


@dataclass
class Chat:
    """Conversation of one visitor."""

    turns: list[Turn] = field(default_factory=list)
    model: str | None = None  # the last one selected, even if it is no longer served
    template: str = "vicuna_v1"
    stop: asyncio.Event = field(default_factory=asyncio.Event)  # of the last answer
    seen: object = None  # state of the model list on the page
    chat_id: str = ""  # key in the browser's history, from the first message on; sessions begin as copies of one chat
    past: list[str] = field(default_factory=list)  # ids of the conversations listed on the page

    preparing: bool = False  # a message, before it becomes a turn

    @property
    def running(self) -> bool:
        return self.preparing or (bool(self.turns) and self.turns[-1].running)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Count as running while a message is checked, so that it cannot be sent twice."""
        self.preparing = True
        try:
            yield
        finally:
            self.preparing = False

    @property
    def sent(self) -> list[Turn]:
        """The turns that a model reads: earlier ones without an answer are omitted, so that roles alternate."""
        return [turn for turn in self.turns if turn.answer or turn is self.turns[-1]]

    def clear(self) -> None:
        """Start a new conversation. A running answer is stopped; it keeps the turns and the event of the old one."""
        self.stop.set()
        self.turns, self.chat_id = [], ""

    def conversation(self) -> tuple[Conversation, list[UploadedImage], list[str]]:
        """The conversation in the current template, its images in order, and the mode of each image.

        A first turn with one image uses the template's image form.
        """
        conversation, turns = get_template(self.template), self.sent
        for index, turn in enumerate(turns):
            count = len(turn.images)
            content: Content = turn.text
            if index == 0 and count == 1 and DEFAULT_IMAGE_TOKEN not in turn.text:
                content = cast(
                    Content, (f"{DEFAULT_IMAGE_TOKEN}\n{turn.text}", None, turn.mode)
                )  # images are sent apart
            elif count:
                content = with_image_token(turn.text, conversation, None, count)
            conversation.append_message(conversation.roles[0], content)
            conversation.append_message(conversation.roles[1], turn.answer or None)
        images = [image for turn in turns for image in turn.images]
        return conversation, images, [turn.mode for turn in turns for _ in turn.images]

    def shown(self, name: str | None = None) -> list[JsonObject]:
        """Messages of the chat view, two for each turn: the user's and the answer.

        The user's text is shown verbatim, answers as Markdown without tags and images. `name` replaces the names of
        the models.
        """
        messages: list[JsonObject] = []
        for turn in self.turns:
            text = turn.text.replace(DEFAULT_IMAGE_TOKEN, "🖼").strip()
            sent: list[object] = [{"path": image.path, "alt_text": "Attached image"} for image in turn.images]
            messages.append({"role": "user", "content": [*sent, verbatim(text)] if text else sent})
            messages.append({"role": "assistant", "content": turn.shown(name)})
        return messages

    def export(self, *, image_bytes: int | None = None) -> JsonObject:
        """The conversation with images as data URIs; the keys include those of the terminal chat's `/save`.

        Images of more than `image_bytes` are downsized.
        """
        conversation, images, _ = self.conversation()
        return {
            "id": self.chat_id,
            "model": self.model,
            "template": self.template,
            "system": conversation.system,
            "messages": conversation.dict()["messages"][conversation.offset :],
            "images": [image.data_uri(image_bytes) for image in images],
            "turns": [
                {"text": turn.text, "answer": turn.answer, "note": turn.note, "finish_reason": turn.finish_reason}
                | {"model": turn.model, "mode": turn.mode, "images": len(turn.images), **asdict(turn.sampling)}
                for turn in self.sent
            ],
        }


def escape(text: str) -> str:
    """Markdown for a view that loads nothing: tags and images are shown as text, formulas are marked for rendering.

    Code, which the view escapes itself, is left as is, except in a text of very many kinds of delimiters.
    """
    parts, end = [], 0
    text = text.replace(_MATH_MARK, "")
    kinds = {len(run) for run in _RUN.findall(text)}
    for found in _LITERAL.finditer(text) if len(kinds) <= _MAX_KINDS else ():
        literal = found[0]
        if found["math"]:
            literal = f"{_MATH_MARK}{html.escape(literal, quote=False)}{_MATH_MARK}"
        parts += [_MARKUP.sub(_as_text, text[end : found.start()]), literal]
        end = found.end()
    return "".join([*parts, _MARKUP.sub(_as_text, text[end:])])


def _as_text(found: re.Match[str]) -> str:
    return "&#92;" * (len(found[1]) // 2) + _entities(found[2])


def _entities(text: str) -> str:
    return "".join(_NAMED.get(character) or f"&#{ord(character)};" for character in text)


def verbatim(text: str) -> str:
    """Markdown that shows `text` character by character, on one line of source."""
    return _ACTIVE.sub(lambda found: _entities(found[0]), text)
