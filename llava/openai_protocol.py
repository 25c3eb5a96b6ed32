"""Client side of the OpenAI chat API as servers speak it: replies, streams, errors and parameters by other names.

Servers differ: a body may be one object or server-sent events, whatever was requested; content may be text, parts or
null; reasons to finish have several names; errors are objects, strings, FastAPI's `detail`, or a proxy's HTML.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Annotated, Final, Literal

import httpx
from httpx_sse import EventSource, ServerSentEvent
from pydantic import BaseModel, BeforeValidator, Field

from llava.errors import one_line, shorten

Finish = Literal["stop", "length", "content_filter", "tool_calls", "aborted"]

MAX_REASON: Final = 500  # characters of an error message
MAX_OBJECT: Final = 64 * 2**20  # bytes of a body that is not a stream
RETRIED_STATUSES: Final = (408, 409, 429)  # client errors that may pass, like all statuses from 500 on
_EVENTS: Final = {"Content-Type": "text/event-stream"}
_BLANK: Final = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and white space
_FINISHES: Final[dict[str, Finish]] = {
    **dict.fromkeys(("length", "max_tokens", "model_length", "max_new_tokens", "max_output_tokens"), "length"),
    **dict.fromkeys(("content_filter", "safety", "recitation", "blocklist", "prohibited_content"), "content_filter"),
    **dict.fromkeys(("tool_calls", "tool_use", "function_call"), "tool_calls"),
    **dict.fromkeys(("abort", "aborted", "cancelled", "canceled", "error"), "aborted"),
}  # every other reason, such as `eos` and `stop_sequence`, is "stop"
_OPEN: Final = r"<think(?:ing)?>|<seed:think>|\[THINK\]|◁think▷"
_CLOSE: Final = r"</think(?:ing)?>|</seed:think>|\[/THINK\]|◁/think▷"
_THINKING: Final = re.compile(
    rf"\s*(?:{_OPEN})?((?:(?!{_OPEN}).)*?)(?:{_CLOSE})", re.DOTALL | re.I
)  # a template may open it
_UNCLOSED: Final = re.compile(rf"\s*(?:{_OPEN})(.*)", re.DOTALL | re.I)
_OVERFLOW: Final = re.compile(
    r"context.?(length|window|size|limit)|max\w*.{0,20}(context|model.?len|input length)|reduce the length"
    r"|longer than the model|(prompt|input)( is| are)? too long|input tokens exceed|must be <= \d+\. given",
    re.IGNORECASE,
)
_UNSUPPORTED: Final = re.compile(
    r"unsupported|not (support|permitt|allow)|unrecogni[sz]ed|unknown|unexpected|instead", re.IGNORECASE
)
# The statuses of errors with a name only, which arrive within a stream or with status 200.
_NAMED_STATUSES: Final = (
    ("rate.?limit|too.?many|quota", 429),
    ("overload|unavailable|busy", 503),
    ("auth|api.?key|permission", 401),
    ("not.?found", 404),
    ("invalid|bad.?request|validation|unsupported|context|exceed", 400),
    ("server|internal|timeout", 500),
)


class ApiError(Exception):
    """Failure of a server: HTTP status (0 if unknown) and OpenAI's `message`, `code`, `type` and `param`.

    `is_structured` distinguishes an error object, which is meant for clients, from the text of a proxy or a traceback.
    """

    def __init__(
        self, message: str, status: int = 0, code: str = "", kind: str = "", param: str = "", *, structured: bool = True
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.kind, self.param = message, status, code, kind, param
        self.is_structured = structured
        self.retry_after: float | None = None  # seconds

    @property
    def is_context_overflow(self) -> bool:
        """Whether the request exceeds the model's context."""
        if self.status in (401, 403, 404, 429) or self.status > 500:
            return False
        return bool(_OVERFLOW.search(f"{self.code} {self.kind} {self.message}"))

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return (self.status in RETRIED_STATUSES or self.status >= 500) and self.code != "insufficient_quota"


def _valid_text(value: object) -> object:
    """Text without lone surrogates, which engines send when a token ends within a character; None for other types."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else None


def _as_parts(value: object) -> object:
    """Content as a list of parts. Raises `ValueError` for numbers and other values that are no content."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    parts = [{"text": part} if isinstance(part, str) else part for part in values]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("content must be text or a list of parts")
    return parts


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else []


Text = Annotated[str | None, BeforeValidator(_valid_text)]
Count = Annotated[int | None, BeforeValidator(lambda value: value if isinstance(value, int) and value >= 0 else None)]
Name = Annotated[str, BeforeValidator(lambda value: "" if value is None else str(value))]


class ContentPart(BaseModel):
    """Part of a message; parts without text, such as references, are ignored."""

    text: Text = None
    refusal: Text = None
    thinking: Annotated[list[ContentPart], BeforeValidator(_as_parts)] = []


class ReplyMessage(BaseModel):
    """Message of a reply, or its increment in a stream."""

    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)] = []
    refusal: Text = None
    reasoning_content: Text = None
    reasoning: Text = None
    tool_calls: Annotated[list[object], BeforeValidator(_as_list)] = []
    function_call: object = None


class TokenLogprob(BaseModel):
    """Log probability of a token, and those of the most probable tokens at its position."""

    token: Name
    logprob: float = Field(allow_inf_nan=False)
    bytes: Annotated[list[int], BeforeValidator(_as_list)] = []
    top_logprobs: Annotated[list[TokenLogprob], BeforeValidator(_as_list)] = []


class Logprobs(BaseModel):
    content: Annotated[list[TokenLogprob], BeforeValidator(_as_list)] = []


class Choice(BaseModel):
    index: Count = 0
    logprobs: Annotated[Logprobs, BeforeValidator(lambda value: value if isinstance(value, dict) else {})] = Logprobs()
    message: ReplyMessage | None = None
    delta: ReplyMessage | None = None
    finish_reason: Text = None


class Usage(BaseModel):
    prompt_tokens: Count = None
    completion_tokens: Count = None


class ChatObject(BaseModel):
    """A chat completion, or one chunk of it."""

    choices: Annotated[list[Choice], BeforeValidator(_as_list)] = []
    usage: Annotated[Usage, BeforeValidator(lambda value: value if isinstance(value, dict) else {})] = Usage()


class ErrorObject(BaseModel):
    """Error of OpenAI, of FastAPI (`detail`), and of older engines."""

    message: Text = None
    detail: object = None
    code: Name = ""
    type: Name = ""
    param: Name = ""
    status: Count = Field(default=None, validation_alias="statusCode")
    metadata: object = None


@dataclass
class Reply:
    """A complete answer. `thinking` is text that the server, or tags at its beginning, set apart from the answer."""

    text: str = ""
    thinking: str = ""
    refusal: str = ""
    finish_reason: Finish = "stop"
    usage: dict[str, int] = field(default_factory=dict)
    called_tool: bool = False

    @property
    def failure(self) -> str | None:
        """Why the answer is not what the model would have written, None if it ended in a usual way."""
        if self.finish_reason == "content_filter":
            return "the server's content filter withheld the answer"
        if self.finish_reason == "aborted":
            return "the server aborted the answer"
        if not self.text.strip() and (self.called_tool or self.finish_reason == "tool_calls"):
            return "the model called a tool instead of answering"
        return None

    @property
    def missing(self) -> str | None:
        """Why there is no answer to score, None if there is one."""
        if self.failure or self.text.strip():
            return self.failure
        if self.refusal:
            return f"the model refused: {one_line(self.refusal, MAX_REASON)}"
        if self.thinking and self.finish_reason == "length":
            return "the model was still thinking at the token limit; allow more new tokens"
        return "the model thought but gave no answer" if self.thinking else "the reply is empty"

    def split_thinking(self) -> Reply:
        """Move thinking between tags at the beginning of `text` to `thinking`."""
        match, rest = _THINKING.match(self.text), ""
        if match is not None:
            rest = self.text[match.end() :]
        else:
            match = _UNCLOSED.match(self.text)
        if match is not None:
            self.thinking, self.text = (self.thinking + match[1]).strip(), rest
        return self


class ReplyReader:
    """Builds the `Reply` of one choice from events.

    Raises `ApiError` for error events, malformed ones, and an incomplete answer. `logprobs` are those since they were
    last taken.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.is_started = self.has_logprobs = False
        self.logprobs: list[TokenLogprob] = []
        self._reply = Reply()
        self._finish = ""
        self._is_done = False

    def push(self, event: ServerSentEvent) -> str:
        """The new text in an event."""
        data = event.data.strip()
        if not data or self._is_done:
            return ""
        if data == "[DONE]":
            self._is_done = True
            return ""
        try:
            value = json.loads(data)
            if event.event == "error" or _is_error(value):
                raise parse_error(value)
            chunk = ChatObject.model_validate(value)
        except (ValueError, RecursionError) as error:
            if self._finish:  # the end of a stream that was cut after the answer
                return ""
            if event.event == "error" or data.startswith("<"):
                raise read_error(data.encode()) from error
            raise ApiError(f"malformed reply: {shorten(data, 200)}", structured=False) from error
        counts = chunk.usage.model_dump(exclude_none=True)
        self._reply.usage = counts or self._reply.usage
        return "".join(self._read(choice) for choice in chunk.choices if (choice.index or 0) == self.index)

    def _read(self, choice: Choice) -> str:
        """The new text of a choice. A message beside or after deltas repeats them."""
        reply, message, logprobs = self._reply, choice.delta, choice.logprobs.content
        self.is_started = True
        if message is None and choice.message is not None:
            self._is_done = True
            message, logprobs = (ReplyMessage(), []) if reply.text else (choice.message, logprobs)
        message = message or ReplyMessage()
        self.logprobs += logprobs
        self.has_logprobs |= bool(logprobs)
        text = "".join(part.text or "" for part in message.content)
        thoughts = [part.text or "" for each in message.content for part in each.thinking]
        reply.thinking += "".join([message.reasoning_content or message.reasoning or "", *thoughts])
        reply.refusal += "".join([message.refusal or "", *(part.refusal or "" for part in message.content)])
        reply.called_tool |= bool(message.tool_calls or message.function_call)
        reply.text += text
        reason = (choice.finish_reason or "").lower()
        self._finish = self._finish if reason in ("", "null", "none") else reason
        return text

    def take_logprobs(self) -> list[dict[str, object]]:
        """The log probabilities since the last call, as JSON objects."""
        found, self.logprobs = [one.model_dump() for one in self.logprobs], []
        return found

    def finish(self) -> Reply:
        """The reply after the last event."""
        if not self._finish and not self._is_done:
            raise ApiError("the reply ended before the answer was complete", structured=False)
        self._reply.finish_reason = _FINISHES.get(self._finish, "stop")
        return self._reply


def _is_object(body: bytes) -> bool:
    """Whether a body, without leading blanks, is JSON or HTML; no line of an event stream begins like this."""
    return body[:1] in (b"{", b"[", b"<")


def read_reply(body: bytes) -> Reply:
    """The reply in a whole body. Raises `ApiError`."""
    body, reader = body.lstrip(_BLANK), ReplyReader()
    if _is_object(body):
        reader.push(ServerSentEvent(data=body.decode("utf-8", "replace")))
    else:
        for event in EventSource(httpx.Response(200, headers=_EVENTS, content=body + b"\n\n")).iter_sse():
            reader.push(event)
    return reader.finish()


async def read_events(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[ServerSentEvent, None]:
    """Events of a streamed body, the last of which may lack its blank line; a body that is an object is one event."""
    async with aclosing(chunks):
        start = b""
        async for chunk in chunks:
            start = (start + chunk).lstrip(_BLANK)
            if len(start) > 0:
                break
        if _is_object(start):
            async for chunk in chunks:
                start += chunk
                if len(start) > MAX_OBJECT:
                    raise ApiError(f"the reply is larger than {MAX_OBJECT} bytes", structured=False)
            yield ServerSentEvent(data=start.decode("utf-8", "replace"))
            return

        async def rest() -> AsyncIterator[bytes]:
            yield start
            async for chunk in chunks:
                yield chunk
            yield b"\n\n"

        async for event in EventSource(httpx.Response(200, headers=_EVENTS, content=rest())).aiter_sse():
            yield event


def _is_error(value: object) -> bool:
    """Whether a JSON value is an error instead of a completion."""
    if isinstance(value, list):
        return bool(value) and _is_error(value[0])
    if not isinstance(value, dict):
        return False
    named = value.get("error") or value.get("object") == "error"
    return bool(named or ("choices" not in value and ("detail" in value or isinstance(value.get("message"), str))))


def read_error(body: bytes, status: int = 0, headers: Mapping[str, str] | None = None) -> ApiError:
    """The error in the response to a refused request."""
    try:
        error = parse_error(json.loads(body), status)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace")
        title = re.search(r"<title>(.*?)</title>", text, re.DOTALL | re.IGNORECASE)
        error = ApiError(
            one_line(title[1] if title else re.sub(r"<[^>]*>", " ", text), MAX_REASON), status, structured=False
        )
    wait = (headers or {}).get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", wait):
        error.retry_after = float(wait)
    elif wait:
        with suppress(ValueError):
            error.retry_after = max(0.0, parsedate_to_datetime(wait).timestamp() - time.time())
    return error


def parse_error(value: object, status: int = 0) -> ApiError:
    """The error in a JSON value; `status` is that of the response, which an object within a stream may replace."""
    if isinstance(value, list):
        value = value[0] if value else {}
    found = (value.get("error") or value) if isinstance(value, dict) else value
    if isinstance(found, str) and isinstance(value, dict):
        found = {"type": value.get("error_type"), "code": value.get("code"), "message": found}
    if not isinstance(found, dict) or not found.keys() & {"message", "detail", "code", "type"}:
        return ApiError(shorten(json.dumps(found), MAX_REASON), status, structured=False)
    error = ErrorObject.model_validate(found)
    raw = error.metadata.get("raw") if isinstance(error.metadata, dict) else None  # of the server behind a router
    message = ": ".join(filter(None, [error.message or _detail(error.detail), str(raw or "")])) or json.dumps(found)
    if status < 400:
        named = (code for pattern, code in _NAMED_STATUSES if re.search(pattern, f"{error.code} {error.type}", re.I))
        number = int(error.code) if re.fullmatch(r"[45]\d\d", error.code) else error.status
        status = number or next(named, 0)
    return ApiError(one_line(message, MAX_REASON), status, error.code, error.type, error.param)


def _detail(detail: object) -> str:
    """FastAPI's `detail`: text, or the fields and reasons without the submitted values."""
    if isinstance(detail, list):
        items = [item for item in detail if isinstance(item, dict)]
        return "; ".join(f"{'.'.join(map(str, item.get('loc') or ()))}: {item.get('msg')}" for item in items)
    return detail if isinstance(detail, str) else ""


@dataclass
class Dialect:
    """How one server takes optional parameters, learned from its refusals."""

    token_field: str = "max_tokens"
    has_usage_option: bool = True

    def translate(self, request: Mapping[str, object]) -> dict[str, object]:
        """A request, written with `max_tokens` and `stream_options`, as the server takes it."""
        names = {"max_tokens": self.token_field}
        dropped = () if self.has_usage_option else ("stream_options",)
        return {names.get(key, key): value for key, value in request.items() if key not in dropped}

    def learn(self, error: ApiError, sent: Mapping[str, object]) -> None:
        """Adapt to the refusal of `sent`; the request is worth sending again if its translation has changed."""
        if error.status not in (400, 422):
            return
        text = f"{error.param} {error.message}"
        if "stream_options" in sent and re.search(r"stream_?options|include_usage", text, re.IGNORECASE):
            self.has_usage_option = False
        elif "max_tokens" in sent and "max_tokens" in text and _UNSUPPORTED.search(f"{error.code} {text}"):
            self.token_field = "max_completion_tokens"
