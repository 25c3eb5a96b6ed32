"""`/v1/responses`: OpenAI's Responses API over the chat of a worker. Nothing is stored between requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llava.serve.common.openai_chat import ApiBody, ChatMessage
from llava.serve.common.protocol import MAX_LOGPROBS, Body, JsonSchema, ResponseFormat
from llava.serve.control.answers import Answer, Json, Piece, Reply


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str

    def part(self) -> Json:
        return {"type": "text", "text": self.text}


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str

    def part(self) -> Json:
        return {"type": "image_url", "image_url": self.image_url}


class InputMessage(Body):
    """Message of `input`; also an item of an earlier response's `output`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]

    def message(self) -> ChatMessage:
        content = self.content if isinstance(self.content, str) else [part.part() for part in self.content]
        return ChatMessage.model_validate({"role": self.role, "content": content})


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    """`text`: the format of the answer."""

    format: PlainFormat | SchemaFormat = Field(default=PlainFormat(type="text"), discriminator="type")
    verbosity: Literal["medium"] | None = None


class ResponseBody(ApiBody):
    """Body of `/v1/responses`."""

    harmless: ClassVar = {
        **ApiBody.harmless,
        "background": (False,),
        "prompt_cache_retention": ("in_memory", "24h"),
        "reasoning": ({}, {"effort": "none"}),
        "truncation": ("disabled",),
    }
    ignored: ClassVar = (*ApiBody.ignored, "stream_options")  # it only pads the events
    remedies: ClassVar = dict.fromkeys(
        ("previous_response_id", "conversation", "prompt"),
        "nothing is stored here; send the earlier messages in input and omit it",
    )

    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[InputMessage], Field(min_length=1, max_length=1024), Tag("items")],
        Discriminator(lambda value: "items" if isinstance(value, list) else "text"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, strict=True, ge=1, le=1_000_000)
    text: TextOptions = TextOptions()
    include: list[Literal["message.output_text.logprobs"]] = Field(default=[], max_length=8)
    top_logprobs: int | None = Field(default=None, strict=True, ge=0, le=MAX_LOGPROBS)
    metadata: dict[str, str] = Field(default={}, max_length=64)
    user: str | None = None
    n: int = Field(default=1, strict=True, ge=1, le=1)

    @model_validator(mode="after")
    def _set_response_format(self) -> ResponseBody:
        chosen = self.text.format
        if self.response_format.type != "text":
            text = "{param} is not supported; send text.format"
            raise PydanticCustomError("unsupported", text, {"param": "response_format"})
        if isinstance(chosen, SchemaFormat):
            self.response_format = ResponseFormat(type="json_schema", json_schema=chosen)
        elif chosen.type != "text":
            self.response_format = ResponseFormat(type=chosen.type)
        self.check_structure()
        return self

    @property
    def messages(self) -> list[ChatMessage]:
        """`instructions` and `input` as a chat."""
        system = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*system, ChatMessage(role="user", content=self.input)]
        return system + [item.message() for item in self.input]

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include or self.top_logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def settings(self) -> Json:
        """The keys of a response that repeat the request."""
        names = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "user")
        text = self.text.model_dump(by_alias=True, exclude_none=True)
        return {**{name: getattr(self, name) for name in names}, "text": text, "top_logprobs": self.top_logprobs or 0}


class ResponseReply(Reply):
    """Reply of `/v1/responses`: a response with one message, or the typed events that build it."""

    path = "/v1/responses"
    prefix = "resp_"
    end = b""

    def __init__(self, model: str, request_id: str, answers: Sequence[Answer], *, settings: Json) -> None:
        super().__init__(model, request_id, answers)
        self.settings = settings
        self._place: Json = {"item_id": f"msg_{request_id}", "output_index": 0, "content_index": 0}
        self._number = 0

    def encode(self, event: Json) -> bytes:
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\n".encode() + super().encode(numbered)

    def whole(self) -> Json:
        return self._response(self._status, [self._item(self._status)])

    def opening(self) -> Iterator[Json]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response("in_progress", [])}
        empty: Json = {**self._item("in_progress"), "content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": empty}
        yield {"type": "response.content_part.added", **self._place, "part": self._part("", [])}

    def piece(self, piece: Piece) -> Iterator[Json]:
        if piece.text or piece.logprobs:
            delta = {"delta": piece.text, "logprobs": piece.logprobs}
            yield {"type": "response.output_text.delta", **self._place, **delta}

    def closing(self) -> Iterator[Json]:
        text, logprobs = self.choices[0].text, self.choices[0].logprobs
        yield {"type": "response.output_text.done", **self._place, "text": text, "logprobs": logprobs}
        yield {"type": "response.content_part.done", **self._place, "part": self._part(text, logprobs)}
        yield {"type": "response.output_item.done", "output_index": 0, "item": self._item(self._status)}
        yield {"type": f"response.{self._status}", "response": self.whole()}

    def failure(self, error: Json) -> Iterator[Json]:
        yield {"type": "error", **{key: error[key] for key in ("code", "message", "param")}, "error": error}
        kind = "server_error" if error["type"] == "server_error" else "invalid_prompt"
        failed = {**self._response("failed", []), "error": {"code": kind, "message": error["message"]}}
        yield {"type": "response.failed", "response": failed}

    @property
    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    @staticmethod
    def _part(text: str, logprobs: Sequence[Any]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item(self, status: str) -> Json:
        part = self._part(self.choices[0].text, self.choices[0].logprobs)
        return {
            "type": "message",
            "id": self._place["item_id"],
            "status": status,
            "role": "assistant",
            "content": [part],
        }

    def _response(self, status: str, output: list[Json]) -> Json:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": self._usage() if output else None,
            **self.settings,
        }

    def _usage(self) -> Json | None:
        counts = self.answers[0].counts
        if not counts:
            return None
        given, made = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
        details = {"cached_tokens": counts.get("cached_tokens", 0)}
        if "image_tokens" in counts:
            details["image_tokens"] = counts["image_tokens"]
        return {
            "input_tokens": given,
            "input_tokens_details": details,
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": given + made,
        }
