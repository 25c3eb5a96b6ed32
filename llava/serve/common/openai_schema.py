"""Bodies of the OpenAI-compatible API, as far as it is served; what would change the answer and is not, is refused."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llava.serve.common.protocol import MAX_STOPS, Body


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_object)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return list(self.content)


class StreamOptions(Body):
    include_usage: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# Says nothing about the answer.
_WITHOUT_EFFECT: Final = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# What asks for something that no model here does, and the values that ask for nothing.
_UNSERVED: Final[dict[str, tuple[Any, ...]]] = {
    "parallel_tool_calls": (True, False),
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class ChatBody(Body):
    """`/v1/chat/completions`."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, strict=True, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, strict=True, ge=1, le=1_000_000)
    temperature: float = Field(default=1.0, strict=True, ge=0, le=100)
    top_p: float = Field(default=1.0, strict=True, gt=0, le=1)
    stop: Annotated[list[Annotated[str, Field(max_length=256)]], BeforeValidator(_as_list)] = Field(
        default=[], max_length=MAX_STOPS - 2
    )
    seed: int | None = Field(default=None, strict=True, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        for key, value in data.items():
            served = key in cls.model_fields or key in _WITHOUT_EFFECT
            if not (served or value in _UNSERVED.get(key, ())):
                name = key[:64].encode("ascii", "replace").decode()
                raise PydanticCustomError("unserved", "{param} is not served here; leave it out", {"param": name})
        return data

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
