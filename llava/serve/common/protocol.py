"""Wire protocol between web page, controller and workers: request bodies, NUL-framed streams and error codes.

A stream is a sequence of frames, each an ASCII JSON object followed by one NUL byte. A request refused before its
stream starts gets an HTTP error status; its body is still one frame, for clients that ignore the status.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from itertools import chain, pairwise
from typing import Annotated, Final, Literal, TypedDict, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import RenderedPrompt
from llava.errors import LlavaError

MAX_STOPS: Final = 16
MAX_TEXT_SPANS: Final = 8192
MAX_CHOICES: Final = 16
MAX_ADAPTERS: Final = 63  # beside their base, in a status of at most 64 models
MAX_LOGPROBS: Final = 20
MAX_GRAMMAR: Final = 65_536  # characters of a schema, a regular expression, or all choices
MAX_NESTING: Final = 100  # levels of a schema; the libraries that read and write it have limits of their own
FRAME_MEDIA_TYPE: Final = "application/octet-stream"

FinishReason = Literal["stop", "length", "context_exceeded", "error", "cancelled"]
Role = Literal["system", "user", "assistant"]
State = Literal["loading", "ready", "draining", "failed"]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**31)]
TextSpan = tuple[Count, Count]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100)]


class TokenLogprob(TypedDict, total=False):
    """Log probability of a token, as in the OpenAI API; `top_logprobs` are the most probable ones at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class Frame(TypedDict, total=False):
    """JSON object of a stream. `text` is the prompt and the answer so far, or new text only in delta mode."""

    text: str
    error_code: int
    finish_reason: FinishReason
    usage: dict[str, int]
    queue_position: int
    error: dict[str, object]
    detail: str
    index: int  # index of the choice, if several were requested
    logprobs: list[TokenLogprob]  # of the tokens since the last frame of this choice


class ErrorType(Enum):
    """Error types: `error.type` on the wire, the legacy `error_code`, and the HTTP status before a stream."""

    BAD_REQUEST = ("bad_request", 1, 400)
    BAD_IMAGE = ("bad_image", 1, 400)
    IMAGE_COUNT_MISMATCH = ("image_count_mismatch", 1, 400)
    CONTEXT_TOO_LONG = ("context_length_exceeded", 1, 400)
    UNAUTHORIZED = ("unauthorized", 1, 401)
    NOT_FOUND = ("model_not_found", 2, 404)
    BODY_TOO_SLOW = ("body_too_slow", 1, 408)
    BODY_TOO_LARGE = ("body_too_large", 1, 413)
    UNSUPPORTED_ENCODING = ("unsupported_encoding", 1, 415)
    RATE_LIMITED = ("rate_limited", 1, 429)
    OUT_OF_MEMORY = ("out_of_memory", 1, 500)
    INTERNAL = ("internal", 1, 500)
    WORKER_UNAVAILABLE = ("worker_unavailable", 3, 502)
    OVERLOADED = ("overloaded", 1, 503)
    NOT_READY = ("not_ready", 1, 503)
    TIMEOUT = ("timeout", 3, 504)

    def __init__(self, wire: str, error_code: int, status: int) -> None:
        self.wire = wire
        self.error_code = error_code
        self.status = status

    @classmethod
    def from_wire(cls, name: object) -> ErrorType:
        """The type with this wire name; `INTERNAL` for an unknown one."""
        return next((kind for kind in cls if kind.wire == name), cls.INTERNAL)


class ServeError(LlavaError):
    """Refusal or failure of a request. `message` is safe to show to clients; `facts` are added to the error object."""

    code = "SERVE"

    def __init__(self, kind: ErrorType, message: str, *, retry_after: float | None = None, **facts: object) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after = retry_after
        self.facts = facts

    def frame(self, request_id: str = "") -> Frame:
        """The frame that reports this error to a client."""
        reason: FinishReason = "context_exceeded" if self.kind is ErrorType.CONTEXT_TOO_LONG else "error"
        error: dict[str, object] = {"type": self.kind.wire, "message": self.message, **self.facts}
        if request_id:
            error["request_id"] = request_id
        return {
            "text": self.message,
            "error_code": self.kind.error_code,
            "finish_reason": reason,
            "error": error,
        }


def encode_frame(frame: Frame) -> bytes:
    """Serialize a frame; JSON is ASCII-escaped, so that it never contains NUL."""
    return json.dumps(frame).encode("ascii") + b"\0"


class FrameReader:
    """Incremental frame parser. `ValueError` for malformed frames and frames larger than `max_bytes`."""

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._buffer = bytearray()
        self._seen = 0  # bytes already searched for a NUL
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Frames completed by `data`; empty frames are ignored."""
        return map(self._parse, self.split(data))

    def split(self, data: bytes) -> Iterator[bytes]:
        """Like `feed`, but yields unparsed frames without their NUL."""
        self._buffer += data
        while (end := self._buffer.find(b"\0", self._seen)) >= 0:
            frame = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._seen = 0
            if frame.strip():
                yield frame
        self._seen = len(self._buffer)
        if self._seen > self._max_bytes:
            raise ValueError(f"a frame is larger than {self._max_bytes} bytes")

    def close(self) -> Iterator[Frame]:
        """The last frame of a body whose final NUL is missing, as some servers send it."""
        frame = bytes(self._buffer)
        self._buffer.clear()
        if frame.strip():
            yield self._parse(frame)

    @staticmethod
    def _parse(data: bytes) -> Frame:
        frame = json.loads(data)
        if not isinstance(frame, dict):
            raise ValueError("a frame is not a JSON object")
        return cast(Frame, frame)


class Body(BaseModel):
    """Base of all request bodies: unknown keys are ignored, numbers must be finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class AdapterInfo(Body):
    """A LoRA adapter that a worker serves as a model; `root` is the name of its directory."""

    name: Name
    root: str = Field(max_length=256)
    conv_template: str | None = Field(default=None, max_length=64)


class ModelInfo(Body):
    """Properties of a served model and its LoRA adapters; absent from workers of other projects."""

    conv_template: str | None = Field(default=None, max_length=64)
    context_length: Count = 2048
    image_tokens: Count | None = None  # per image; 0 for a text-only model, None when unknown
    max_new_tokens: Count = 1024
    max_images: Count = 16
    adapters: list[AdapterInfo] = Field(default=[], max_length=MAX_ADAPTERS)


class WorkerStatus(Body):
    """Reply of `/worker_get_status`; the first three keys are the published ones."""

    model_names: list[Name] = Field(max_length=64)
    speed: float = Field(strict=True, ge=0, le=1e6)
    queue_length: float = Field(strict=True, ge=0, le=2**31)
    state: State = "ready"
    loading: list[Name] = Field(default=[], max_length=64)  # names of the models being loaded
    progress: int | None = Field(default=None, ge=0, le=100)  # percent of the weights loaded
    features: list[Name] = Field(default=[], max_length=32)  # "delta", "messages", "sampling", "text_spans", …
    info: ModelInfo | None = None

    @property
    def base(self) -> str | None:
        """The model that the adapters adapt."""
        return next((name for name in self.model_names if self.adapter(name) is None), None)

    def adapter(self, model: str) -> AdapterInfo | None:
        """The adapter that is served under the name `model`."""
        return next((one for one in (self.info.adapters if self.info else ()) if one.name == model), None)

    def template_of(self, model: str) -> str | None:
        """The conversation template of one of the models."""
        source = self.adapter(model) or self.info
        return source.conv_template if source else None


class RegisterBody(Body):
    """Body of `/register_worker`."""

    worker_name: str = Field(max_length=512)
    check_heart_beat: bool
    worker_status: WorkerStatus | None = None

    @field_validator("worker_status")
    @classmethod
    def _speed_is_positive(cls, status: WorkerStatus | None) -> WorkerStatus | None:
        if status is not None and status.speed == 0:
            raise ValueError("speed must be greater than 0")
        return status


class NameBody(Body):
    """Body of `/unregister_worker`."""

    worker_name: str = Field(max_length=512)


class HeartBeatBody(NameBody):
    """Body of `/receive_heart_beat`."""

    queue_length: float = Field(strict=True, ge=0, le=2**31)


class AddressBody(Body):
    """Body of `/get_worker_address`."""

    model: str = Field(max_length=256)


class Message(Body):
    """One turn of `messages`; each `<image>` in a user's `content` refers to the next item of `images`."""

    role: Role
    content: str


class JsonSchema(Body):
    """A JSON schema with its name; `strict` makes no difference, since every schema is enforced."""

    name: str = Field(default="answer", max_length=64)
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") is not (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only with it")
        return self


class SamplingFields(Body):
    """Sampling and structured output of a request, by the names and in the ranges of the OpenAI API and vLLM.

    The defaults change nothing; `top_k` is off at 0 and -1. `presence_penalty` and `frequency_penalty` count generated
    tokens, `repetition_penalty` also the prompt's. `logit_bias` is by token id. `n` is the number of choices. The
    answer follows `response_format`, or `guided_json` (a JSON schema), `guided_regex` or `guided_choice`.
    """

    temperature: float = Field(default=1.0, strict=True, ge=0, le=100)
    top_p: float = Field(default=1.0, strict=True, gt=0, le=1)
    top_k: Annotated[int, AfterValidator(lambda count: max(count, 0))] = Field(default=0, strict=True, ge=-1, lt=2**31)
    min_p: float = Field(default=0.0, strict=True, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, strict=True, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, strict=True, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, strict=True, gt=0, le=10)
    logit_bias: dict[TokenId, Bias] = Field(default={}, max_length=1024)
    seed: int | None = Field(default=None, strict=True, ge=0, lt=2**63)
    n: int = Field(default=1, strict=True, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat = ResponseFormat()
    guided_json: dict[str, object] | Json[dict[str, object]] | None = None
    guided_regex: str | None = Field(default=None, min_length=1, max_length=MAX_GRAMMAR)
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=1024)

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to report per generated token; None for no log probabilities."""
        return None

    @property
    def schema_of_answer(self) -> dict[str, object] | None:
        """The JSON schema that the answer must follow."""
        if self.response_format.json_schema is not None:
            return self.response_format.json_schema.schema_
        return {"type": "object"} if self.response_format.type == "json_object" else self.guided_json

    def worker_fields(self) -> dict[str, object]:
        """These fields for the body of a worker request: the published ones, and others that change anything."""
        names = set(SamplingFields.model_fields)
        given = self.model_dump(mode="json", by_alias=True, include=names, exclude_defaults=True)
        logprobs = {} if self.num_logprobs is None else {"top_logprobs": self.num_logprobs}
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, **given, **logprobs}

    @model_validator(mode="after")
    def _validate_structure(self) -> SamplingFields:
        self.check_structure()
        return self

    def check_structure(self) -> None:
        """Raise the error of a validator if the structure of the answer is given twice, too long or nested too deeply.

        Called again by bodies that have it under other names.
        """
        given = [name for name in ("guided_json", "guided_regex", "guided_choice") if getattr(self, name) is not None]
        given += ["response_format"] * (self.response_format.type != "text")
        if len(given) > 1:
            raise invalid(given[0], f"excludes {given[1]}; give one of them")
        if not _is_within(self.schema_of_answer, MAX_NESTING):
            raise invalid(given[0], f"is nested more than {MAX_NESTING} levels deep; simplify the schema")
        if max(len(json.dumps(self.schema_of_answer)), len("".join(self.guided_choice or ()))) > MAX_GRAMMAR:
            raise invalid(given[0], f"is longer than {MAX_GRAMMAR} characters")
        if self.guided_choice is not None and not all(self.guided_choice):
            raise invalid("guided_choice", "has an empty choice")


def _is_within(value: object, levels: int) -> bool:
    """Whether objects and arrays in a JSON value are nested at most `levels` deep."""
    inside = [value]
    for _ in range(levels + 1):
        parts = [part for part in inside if isinstance(part, (dict, list))]
        inside = [each for part in parts for each in (part.values() if isinstance(part, dict) else part)]
    return not inside


def invalid(param: str, text: str) -> PydanticCustomError:
    """Error of a validator that checks several fields; `param` is the field named to clients."""
    return PydanticCustomError("invalid", "{param} {text}", {"param": param, "text": text})


class PromptFields(Body):
    """A prompt for a model, see `GenerateBody`."""

    model: str = Field(default="", max_length=256)
    prompt: str = Field(max_length=4_000_000)
    text_spans: list[TextSpan] = Field(default=[], max_length=MAX_TEXT_SPANS)

    @property
    def rendered_prompt(self) -> RenderedPrompt:
        return RenderedPrompt(self.prompt, self.text_spans)

    @model_validator(mode="after")
    def _check_text_spans(self) -> PromptFields:
        bounds = [0, *chain.from_iterable(self.text_spans), len(self.prompt)]
        if any(start > end for start, end in pairwise(bounds)):
            raise ValueError("text_spans must be sorted, disjoint ranges [start, end) within the prompt")
        return self


class TokenizeBody(PromptFields):
    """Body of `/worker_tokenize`. The reply has the token ids, -200 for each image, and their count with images."""

    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Body of `/worker_detokenize`."""

    model: str = Field(default="", max_length=256)
    tokens: list[Annotated[int, Field(ge=IMAGE_TOKEN_INDEX, lt=2**31)]] = Field(max_length=1_000_000)


class GenerateBody(SamplingFields, PromptFields):
    """Body of `/worker_generate_stream`.

    `images` are base64. `stream_mode` "delta" requests new text only; `messages` repeat the prompt as turns. The keys
    `org_images` and `max_input_tiles`, sent by some clients, are ignored.

    `text_spans` are the ranges [start, end) of `prompt`, in Unicode code points, that hold the text of messages and of
    the system: sorted, disjoint, and 8,192 at most. Control tokens, role markers and `<image>` in them are text.
    Without the key, as from older clients, they are recognized anywhere in the prompt.

    With `top_logprobs`, frames have the log probabilities of new tokens as `logprobs`; with `n` above 1, the `index` of
    their choice, and each choice has a finish reason. Workers with the feature "sampling" take these keys and those of
    `SamplingFields` beside the published `temperature`, `top_p` and `seed`.

    Workers with the feature "completions" take `prompt_token_ids` in place of an empty `prompt`, and with `strip` false
    keep white space at both ends of the answer.
    """

    images: list[str] = Field(default=[], max_length=64)
    max_new_tokens: int = Field(default=256, strict=True, ge=1, le=1_000_000)
    stop: list[str] = Field(default=[], max_length=MAX_STOPS)
    top_logprobs: int | None = Field(default=None, strict=True, ge=0, le=MAX_LOGPROBS)
    stream_mode: Literal["cumulative", "delta"] = "cumulative"
    messages: list[Message] | None = Field(default=None, max_length=2048)
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1, max_length=1_000_000)
    strip: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        return data

    @field_validator("stop")
    @classmethod
    def _check_stops(cls, stops: list[str]) -> list[str]:
        if any(len(text) > 256 for text in stops):
            raise ValueError("a stop string has more than 256 characters")
        return [text for text in stops if text]


class WorkerView(Body):
    """Entry of `/list_workers`: a worker's public state, without its address."""

    models: list[Name]
    loading: list[Name]
    progress: int | None = None
    state: State
    queue_length: float
    features: list[Name]
    info: ModelInfo | None
