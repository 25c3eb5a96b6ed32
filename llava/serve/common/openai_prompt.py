"""Between chat messages and rendered prompts, both ways: the API renders, the adapter to another engine parses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, get_template, stop_strings, with_image_token
from llava.errors import TemplateError
from llava.serve.common.openai_schema import ChatMessage, ImagePart, TextPart
from llava.serve.common.protocol import ErrorType, Message, Role, ServeError


@dataclass(frozen=True)
class Rendered:
    """A prompt for a worker, the same as plain turns, the pictures' addresses in order, and what ends the answer."""

    prompt: str
    messages: list[Message]
    pictures: list[str]
    stop: list[str]


def render(messages: Sequence[ChatMessage], template: str) -> Rendered:
    """Render `messages` in a model's own template. `ServeError` (400) when they are no conversation.

    Neighbouring messages of one role are joined. A `<image>` that the client wrote keeps its place; there must be as
    many as pictures then. Pictures without one go where they stand among the text, a single one in front.
    """
    turns, pictures = _turns(messages)
    conversation = get_template(template)
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    if system:
        conversation.set_system(system)
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken or spoken[0].role != "user" or spoken[-1].role != "user":
        raise ServeError(
            ErrorType.BAD_REQUEST,
            "The conversation must begin and end with a message of the user (after any system message).",
            param="messages",
        )
    for turn in spoken:
        text = turn.content
        if turn.role == "user" and DEFAULT_IMAGE_TOKEN in text:
            text = with_image_token(text, conversation, None)
        conversation.append_message(conversation.roles[turn.role == "assistant"], text)
    conversation.append_message(conversation.roles[1], None)
    try:
        prompt = conversation.get_prompt()
    except TemplateError as error:  # one that cannot open with an empty message
        raise ServeError(ErrorType.BAD_REQUEST, str(error.args[0]), param="messages") from error
    tags = prompt.count(DEFAULT_IMAGE_TOKEN)
    if tags != len(pictures):
        raise ServeError(
            ErrorType.IMAGE_COUNT_MISMATCH,
            f"The messages have {tags} {DEFAULT_IMAGE_TOKEN} placeholder(s) but {len(pictures)} image(s); leave the "
            "placeholders out, or write one for each image.",
            param="messages",
        )
    return Rendered(prompt, turns, pictures, list(stop_strings(conversation)))


def _turns(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[str]]:
    """Plain turns with placeholders, neighbours of one role joined; and the pictures."""
    turns: list[Message] = []
    pictures: list[str] = []
    for message in messages:
        role: Role = "system" if message.role == "developer" else message.role
        parts = message.parts
        found = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if found and role != "user":
            raise ServeError(ErrorType.BAD_REQUEST, f"A {role} message cannot hold images.", param="messages")
        pictures += found
        text = _placed(parts)
        if turns and turns[-1].role == role:
            turns[-1] = Message(role=role, content=f"{turns[-1].content}\n{text}")
        else:
            turns.append(Message(role=role, content=text))
    return turns, pictures


def _placed(parts: Sequence[TextPart | ImagePart]) -> str:
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    images = len(parts) - len(texts)
    if any(DEFAULT_IMAGE_TOKEN in text for text in texts):
        return "\n".join(texts)
    if images <= 1:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * images + "\n".join(texts)
    return "\n".join(part.text if isinstance(part, TextPart) else DEFAULT_IMAGE_TOKEN for part in parts)


def parse(prompt: str, template: str) -> list[Message]:
    """The turns in a prompt that was rendered in `template`; the open assistant turn at the end is left out.

    For engines that take messages, behind clients that send only a prompt. `ServeError` (400) if it is in no such form.
    """
    conversation = get_template(template)
    user, assistant = (_marker(conversation, role) for role in conversation.roles)
    if user == assistant:
        return [Message(role="user", content=prompt)]
    pieces = re.split(f"({re.escape(user)}|{re.escape(assistant)})", prompt)
    system = pieces[0].removesuffix(conversation.sep).strip()
    turns = [Message(role="system", content=system)] if system else []
    for marker, text in zip(pieces[1::2], pieces[2::2]):
        role: Role = "user" if marker == user else "assistant"
        for end in {conversation.sep, conversation.sep2 or conversation.sep}:
            text = text.removesuffix(end) if end.strip() else text
        if text.strip() or role == "user":
            turns.append(Message(role=role, content=text.strip()))
    if len(pieces) < 3:
        raise ServeError(ErrorType.BAD_REQUEST, f"The prompt is not in the template {template!r} of this model.")
    return turns


def _marker(conversation: Conversation, role: str) -> str:
    """How a turn of this role begins in the prompt."""
    return role if conversation.sep_style is SeparatorStyle.MPT else f"{role}:"
