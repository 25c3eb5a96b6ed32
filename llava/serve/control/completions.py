"""`/v1/completions`, text completion without a conversation template, and `/tokenize` and `/detokenize`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Final

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import RenderedPrompt
from llava.serve.common.openai_chat import ApiBody, ChatMessage, StreamOptions, StrictBody
from llava.serve.common.protocol import MAX_LOGPROBS, DetokenizeBody, TokenId, TokenLogprob
from llava.serve.control.answers import Answer, Choice, ChoicesReply, Json, Shown

MAX_ANSWERS: Final = 32
_AtMost: Final = Field(min_length=1, max_length=MAX_ANSWERS)
Text = Annotated[str, Field(max_length=4_000_000)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]


def _kind_of_prompt(value: object) -> str:
    if not isinstance(value, list):
        return "text"
    return {int: "tokens", list: "token lists"}.get(type(next(iter(value), "")), "texts")


class CompletionBody(ApiBody):
    """Body of `/v1/completions`. A prompt is text, in which control tokens are recognized, or token ids."""

    harmless: ClassVar = {**ApiBody.harmless, "suffix": ("",), "best_of": (1,)}
    remedies: ClassVar = {"suffix": "the models continue text and cannot fill in; omit it"}

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[Text], _AtMost, Tag("texts")]
        | Annotated[list[Tokens], _AtMost, Tag("token lists")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: int = Field(default=16, strict=True, ge=1, le=1_000_000)
    echo: bool = False
    logprobs: int | None = Field(default=None, strict=True, ge=0, le=MAX_LOGPROBS)
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionBody:
        if len(self.prompts) * self.n > MAX_ANSWERS:
            text = "{param} times n must be at most {most}; send several requests"
            raise PydanticCustomError("invalid", text, {"param": "prompt", "most": MAX_ANSWERS})
        if self.echo and self.logprobs is not None:
            text = "{param} is not supported with echo, since prompts have no log probabilities; omit one of them"
            raise PydanticCustomError("unsupported", text, {"param": "logprobs"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[str | list[int]] = [each for each in self.prompt if not isinstance(each, int)]
        return prompts or [[each for each in self.prompt if isinstance(each, int)]]


def as_prompt(text: str) -> RenderedPrompt:
    """A prompt without images: control tokens are recognized, and `<image>` is text."""
    return RenderedPrompt(text, [match.span() for match in re.finditer(DEFAULT_IMAGE_TOKEN, text)])


def prompt_fields(prompt: str | list[int]) -> Json:
    """The keys of a worker request that hold a prompt."""
    if not isinstance(prompt, str):
        return {"prompt": "", "prompt_token_ids": prompt, "strip": False}
    rendered = as_prompt(prompt)
    return {"prompt": rendered, "text_spans": rendered.text_spans, "strip": False}


class CompletionReply(ChoicesReply):
    """Reply of `/v1/completions`. `echo` are the texts of the prompts, which precede their answers."""

    path = "/v1/completions"
    prefix = "cmpl-"
    kind = chunk_kind = "text_completion"

    def __init__(
        self, model: str, request_id: str, answers: Sequence[Answer], *, shown: Shown, echo: Sequence[str] = ()
    ) -> None:
        super().__init__(model, request_id, answers, shown=shown)
        self._echo = {c.index: text for answer, text in zip(answers, echo) for c in answer.choices}
        self._offsets = dict.fromkeys((choice.index for choice in self.choices), 0)

    def opening(self) -> Iterator[Json]:
        for choice in self.choices:
            if choice.index in self._echo:
                yield self.chunk(choice, {"text": self._echo[choice.index]})

    def content(self, choice: Choice) -> Json:
        return {"text": self._echo.get(choice.index, "") + choice.text}

    def delta(self, text: str) -> Json:
        return {"text": text}

    def logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> object:
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += _num_characters(entry)
        tokens, values = [_text_of(entry) for entry in entries], [entry["logprob"] for entry in entries]
        tops = [_by_text(entry) for entry in entries]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _text_of(entry: TokenLogprob) -> str:
    """The text of a token; like OpenAI, `bytes:\\xe2\\x80` for parts of characters."""
    data = bytes(entry.get("bytes", ()))
    try:
        return data.decode() or entry["token"]
    except UnicodeDecodeError:
        return f"bytes:{repr(data)[2:-1]}"


def _by_text(entry: TokenLogprob) -> dict[str, float]:
    """Log probabilities of the most probable tokens and the generated one; a number follows a text that repeats."""
    table, tops = {_text_of(entry): entry["logprob"]}, list(entry.get("top_logprobs", []))
    generated = next((top for top in tops if {_text_of(top): top["logprob"]} == table), None)
    for top in tops:
        text, copies = _text_of(top), 1
        while top is not generated and text in table:
            copies += 1
            text = f"{_text_of(top)}#{copies}"
        table[text] = top["logprob"]
    return dict(sorted(table.items(), key=lambda item: -item[1]))


def _num_characters(entry: TokenLogprob) -> int:
    """Characters that begin in a token. The bytes of one may be spread over several tokens, whose text is U+FFFD."""
    starts = sum(byte & 0xC0 != 0x80 for byte in entry.get("bytes", ()))
    return starts if entry.get("bytes") else len(entry["token"])


class TokenizeRequest(StrictBody):
    """Body of `/tokenize`: a text, or messages as in `/v1/chat/completions`."""

    harmless: ClassVar = {"add_generation_prompt": (True,), "continue_final_message": (False,)}

    model: str = Field(default="", max_length=256)
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=1024)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeRequest:
        if (self.prompt is None) is (self.messages is None):
            raise PydanticCustomError("invalid", "give either {param} or messages", {"param": "prompt"})
        return self


class DetokenizeRequest(StrictBody, DetokenizeBody):
    """Body of `/detokenize`."""
