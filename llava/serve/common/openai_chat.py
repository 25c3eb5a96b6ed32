"""OpenAI chat requests, and their conversion to and from prompts rendered in a conversation template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import (
    Conversation,
    Piece,
    RenderedPrompt,
    SeparatorStyle,
    get_template,
    stop_strings,
    with_image_token,
)
from llava.errors import TemplateError
from llava.serve.common.protocol import (
    MAX_LOGPROBS,
    MAX_STOPS,
    Body,
    ErrorType,
    Message,
    Role,
    SamplingFields,
    ServeError,
    invalid,
)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str


def _as_image_url(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_image_url)]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return list(self.content)


class StreamOptions(Body):
    include_usage: bool = False


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StrictBody(Body):
    """Body that rejects unsupported parameters that would change the answer, by name; other bodies ignore them."""

    # Parameters that do not change the answer, and unsupported features with the values that leave them off.
    ignored: ClassVar[tuple[str, ...]] = (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
    )
    harmless: ClassVar[dict[str, tuple[object, ...]]] = {}
    remedies: ClassVar[dict[str, str]] = {}  # instead of "omit it"

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        for key, value in data.items():
            supported = key in cls.model_fields or key in cls.ignored
            if not (supported or value in cls.harmless.get(key, ())):
                facts = {
                    "param": key[:64].encode("ascii", "replace").decode(),
                    "remedy": cls.remedies.get(key, "omit it"),
                }
                raise PydanticCustomError("unsupported", "{param} is not supported; {remedy}", facts)
        return data


class ApiBody(StrictBody, SamplingFields):
    """Base class of the bodies of generating routes."""

    harmless: ClassVar[dict[str, tuple[object, ...]]] = {
        "parallel_tool_calls": (True, False),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }

    model: str = Field(min_length=1, max_length=256)
    stream: bool = False
    stop: Annotated[list[Annotated[str, Field(max_length=256)]], BeforeValidator(_as_list)] = Field(
        default=[], max_length=MAX_STOPS - 2
    )

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of tokens of an answer; None for the limit of the worker."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _read_structured_outputs(cls, data: object) -> object:
        """Read vLLM's `structured_outputs` as `guided_json`, `guided_regex` or `guided_choice`, its older names."""
        if not isinstance(data, dict) or data.get("structured_outputs") is None:
            return data
        rest = dict(data)
        given = rest.pop("structured_outputs")
        given = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
        if not given or given.keys() - {"json", "regex", "choice"}:
            raise invalid("structured_outputs", "must be an object with exactly one of the keys json, regex and choice")
        named = {f"guided_{name}": value for name, value in given.items()}
        for name, value in named.items():
            if rest.get(name) not in (None, value):
                raise invalid("structured_outputs", f"excludes {name}; give one of them")
        return {**rest, **named}


class ChatBody(ApiBody):
    """Body of `/v1/chat/completions`. Tools are accepted unless one must be called: the models answer with text."""

    ignored: ClassVar = (*ApiBody.ignored, "tools", "functions")
    harmless: ClassVar = {
        **ApiBody.harmless,
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, strict=True, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, strict=True, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, strict=True, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid", "{param} needs logprobs: true", {"param": "top_logprobs"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


@dataclass(frozen=True)
class RenderedChat:
    """Chat rendered for a worker: the prompt, the same as plain turns, image addresses in order, stop strings."""

    prompt: RenderedPrompt
    messages: list[Message]
    images: list[str]
    stop: list[str]


def render_chat(messages: Sequence[ChatMessage], template: str) -> RenderedChat:
    """Render `messages` in the conversation template called `template`.

    Consecutive messages of one role are joined. An `<image>` typed in a user message keeps its position, and there must
    be one for each image; elsewhere it is text. Without any, a single image precedes the text and several images stay
    between the text parts.
    Raises `ServeError` (400) when the messages are no valid conversation.
    """
    turns, images = _turns(messages)
    conversation = get_template(template)
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    if system:
        conversation.set_system(system)
    dialogue = [turn for turn in turns if turn.role != "system"]
    if not dialogue or dialogue[0].role != "user" or dialogue[-1].role != "user":
        raise ServeError(
            ErrorType.BAD_REQUEST,
            "The conversation must begin and end with a user message (after any system message).",
            param="messages",
        )
    for turn in dialogue:
        text = turn.content
        if turn.role == "user" and DEFAULT_IMAGE_TOKEN in text:
            text = with_image_token(text, conversation, None)
        conversation.append_message(conversation.roles[turn.role == "assistant"], text)
    conversation.append_message(conversation.roles[1], None)
    try:
        prompt = conversation.get_prompt()
    except TemplateError as error:  # the template cannot open with an empty message
        raise ServeError(ErrorType.BAD_REQUEST, str(error.args[0]), param="messages") from error
    placeholders = prompt.num_images
    if placeholders != len(images):
        raise ServeError(
            ErrorType.IMAGE_COUNT_MISMATCH,
            f"The messages have {placeholders} {DEFAULT_IMAGE_TOKEN} placeholder(s) but {len(images)} image(s); omit "
            "the placeholders, or write one for each image.",
            param="messages",
        )
    return RenderedChat(prompt, turns, images, list(stop_strings(conversation)))


def _turns(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[str]]:
    """Plain turns with placeholders, consecutive ones of a role joined; and the image addresses."""
    turns: list[Message] = []
    images: list[str] = []
    for message in messages:
        role: Role = "system" if message.role == "developer" else message.role
        parts = message.parts
        found = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if found and role != "user":
            raise ServeError(
                ErrorType.BAD_REQUEST, f"A message with role {role!r} must not contain images.", param="messages"
            )
        images += found
        text = _text_of(parts)
        if turns and turns[-1].role == role:
            turns[-1] = Message(role=role, content=f"{turns[-1].content}\n{text}")
        else:
            turns.append(Message(role=role, content=text))
    return turns, images


def _text_of(parts: Sequence[TextPart | ImagePart]) -> str:
    """The text of a message with a placeholder for each image, unless the client has typed placeholders."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    images = len(parts) - len(texts)
    if any(DEFAULT_IMAGE_TOKEN in text for text in texts):
        return "\n".join(texts)
    if images <= 1:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * images + "\n".join(texts)
    return "\n".join(part.text if isinstance(part, TextPart) else DEFAULT_IMAGE_TOKEN for part in parts)


def parse_prompt(prompt: str, template: str) -> list[Message]:
    """Split a prompt rendered in `template` into turns, without the open assistant turn at the end.

    Serves clients that send only a prompt to engines that take messages. Role markers and separators in the text of the
    prompt are text. Raises `ServeError` (400) when the prompt is not in the template.
    """
    conversation = get_template(template)
    user, assistant = (_role_marker(conversation, role) for role in conversation.roles)
    if user == assistant:
        return [Message(role="user", content=prompt)]
    # The prompt with its text replaced, so that only markers of the template are found.
    pieces = prompt.pieces() if isinstance(prompt, RenderedPrompt) else [Piece(prompt)]
    outline = "".join("\0" * len(text) if is_text else text for text, is_text in pieces)
    markers = list(re.finditer(f"{re.escape(user)}|{re.escape(assistant)}", outline))
    if not markers:
        raise ServeError(ErrorType.BAD_REQUEST, f"The prompt is not in this model's template {template!r}.")
    ends = [end for end in (conversation.sep, conversation.sep2) if end and end.strip()]
    turns: list[Message] = []
    for marker, following in pairwise([None, *markers, None]):
        start, stop = marker.end() if marker else 0, following.start() if following else len(prompt)
        for end in ends:
            stop -= len(end) * outline.endswith(end, start, stop)
        role: Role = "system" if marker is None else "user" if marker[0] == user else "assistant"
        text = prompt[start:stop].removeprefix("" if marker else _system_header(conversation)).strip()
        if text or role == "user":
            turns.append(Message(role=role, content=text))
    return turns


def _system_header(conversation: Conversation) -> str:
    """The text that opens the system text in the prompt."""
    return conversation.system.split("\n")[0] + "\n" if conversation.sep_style is SeparatorStyle.MPT else ""


def _role_marker(conversation: Conversation, role: str) -> str:
    """The text that opens a turn of this role in the prompt."""
    return role if conversation.sep_style is SeparatorStyle.MPT else f"{role}:"
