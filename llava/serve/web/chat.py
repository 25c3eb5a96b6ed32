"""The state of one conversation in the browser: its turns, how they are shown, sent, exported and logged."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, get_template, with_image_token
from llava.errors import RequestError
from llava.serve.web.images import Picture

CURSOR: Final = "▌"
_CODE: Final = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


@dataclass(frozen=True)
class Sampling:
    """How a turn is answered; the sliders when it was asked."""

    temperature: float = 0.8
    top_p: float = 0.7
    max_new_tokens: int = 1024
    max_input_tiles: int = 12


@dataclass
class Turn:
    """A message, its pictures and its answer. `note` says why an answer is missing or cut short; it is never sent."""

    text: str
    pictures: tuple[Picture, ...] = ()
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

    def check(self) -> None:
        """Raise `RequestError` when the placeholders typed into the text do not fit the pictures."""
        typed = self.text.count(DEFAULT_IMAGE_TOKEN)
        if typed and typed != len(self.pictures):
            raise RequestError(
                f"The text has {typed} {DEFAULT_IMAGE_TOKEN} placeholder(s) but comes with {len(self.pictures)} "
                f"picture(s); leave {DEFAULT_IMAGE_TOKEN} out, or write it once for each picture."
            )


@dataclass
class Chat:
    """One visitor's conversation with one model at a time."""

    turns: list[Turn] = field(default_factory=list)
    model: str | None = None  # the last one chosen, also while nobody serves it
    template: str = "vicuna_v1"
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    seen: object = None  # what the page shows of the model list

    @property
    def running(self) -> bool:
        return bool(self.turns) and self.turns[-1].running

    def conversation(self) -> tuple[Conversation, list[Picture], list[str]]:
        """The conversation under the current template, its pictures in order, and the mode of each.

        Earlier turns without any answer are left out, so that roles alternate. A first turn with one picture takes
        the renderer's own form for it (spec/serve.md §8.5).
        """
        conversation = get_template(self.template)
        turns = [turn for turn in self.turns if turn.answer or turn is self.turns[-1]]
        for index, turn in enumerate(turns):
            count = len(turn.pictures)
            content: Any = turn.text
            if index == 0 and count == 1 and DEFAULT_IMAGE_TOKEN not in turn.text:
                content = (f"{DEFAULT_IMAGE_TOKEN}\n{turn.text}", None, turn.mode)
            elif count:
                content = with_image_token(turn.text, conversation, None, count)
            conversation.append_message(conversation.roles[0], content)
            conversation.append_message(conversation.roles[1], turn.answer or None)
        pictures = [picture for turn in turns for picture in turn.pictures]
        return conversation, pictures, [turn.mode for turn in turns for _ in turn.pictures]

    def shown(self) -> list[dict[str, Any]]:
        """Messages for the chat view; markup in them is shown as typed, never run."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            messages += [{"role": "user", "content": {"path": picture.shown}} for picture in turn.pictures]
            text = turn.text.replace(DEFAULT_IMAGE_TOKEN, "🖼").strip()
            if text:
                messages.append({"role": "user", "content": escape(text)})
            answer = escape(turn.answer) + (CURSOR if turn.running else "")
            if turn.note:
                answer += ("\n\n" if answer else "") + f"*{escape(turn.note)}*"
            if answer:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def export(self) -> dict[str, Any]:
        """Everything said, pictures included as data URIs; the same keys as the terminal chat's `/save`."""
        conversation, pictures, _ = self.conversation()
        return {
            "model": self.model,
            "template": self.template,
            "system": conversation.system,
            "messages": conversation.dict()["messages"][conversation.offset :],
            "images": [picture.uri() for picture in pictures],
            "turns": [
                {"text": turn.text, "answer": turn.answer, "note": turn.note, "finish_reason": turn.finish_reason}
                | {"model": turn.model, "mode": turn.mode, "pictures": len(turn.pictures), **asdict(turn.sampling)}
                for turn in self.turns
            ],
        }


def escape(text: str) -> str:
    """`text` for a Markdown view with every tag made visible; code, which the view escapes itself, is kept."""
    pieces = _CODE.split(text)
    pieces[::2] = [piece.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for piece in pieces[::2]]
    return "".join(pieces)
