"""The wire between web page, controller and workers: bodies, NUL-framed streams and error codes (spec/serve.md §3–5).

A stream is a run of frames, each an ASCII JSON object and one NUL byte. A request that is refused before its stream
starts gets an HTTP error status, and its body is still one frame, which clients that never look at the status show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llava.errors import LlavaError

TOKEN_VARIABLE: Final = "LLAVA_TOKEN"  # shared by controller, workers and web page; sent as `Authorization: Bearer`
MAX_STOPS: Final = 16
FRAME_MEDIA_TYPE: Final = "application/octet-stream"

FinishReason = Literal["stop", "length", "context_exceeded", "error", "cancelled"]
Role = Literal["system", "user", "assistant"]
State = Literal["loading", "ready", "draining", "failed"]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**31)]


class ErrorType(Enum):
    """What went wrong: the `error.type` on the wire, the legacy `error_code`, and the HTTP status before a stream."""

    BAD_REQUEST = ("bad_request", 1, 400)
    BAD_IMAGE = ("bad_image", 1, 400)
    IMAGE_COUNT_MISMATCH = ("image_count_mismatch", 1, 400)
    CONTEXT_TOO_LONG = ("context_length_exceeded", 1, 400)
    UNAUTHORIZED = ("unauthorized", 1, 401)
    NOT_FOUND = ("model_not_found", 2, 404)
    BODY_TOO_SLOW = ("body_too_slow", 1, 408)
    BODY_TOO_LARGE = ("body_too_large", 1, 413)
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
        """The type of that wire name; `INTERNAL` for one this version does not know."""
        return next((kind for kind in cls if kind.wire == name), cls.INTERNAL)


class ServeError(LlavaError):
    """A request that cannot be served. `str(error)` is safe to show to the client; `facts` go into `error` too."""

    code = "SERVE"

    def __init__(self, kind: ErrorType, message: str, *, retry_after: float | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after = retry_after
        self.facts = facts

    def frame(self, request_id: str = "") -> dict[str, Any]:
        """The one frame that tells the client."""
        reason = "context_exceeded" if self.kind is ErrorType.CONTEXT_TOO_LONG else "error"
        error = {"type": self.kind.wire, "message": self.message, **self.facts}
        if request_id:
            error["request_id"] = request_id
        return {
            "text": self.message,
            "error_code": self.kind.error_code,
            "finish_reason": reason,
            "error": error,
        }


def encode_frame(frame: dict[str, Any]) -> bytes:
    """One frame as it goes over the wire; ASCII-escaped, so that NUL never occurs inside."""
    return json.dumps(frame).encode("ascii") + b"\0"


class FrameReader:
    """Bytes in any pieces in, frames out. `ValueError` for what is not a JSON object or is larger than `max_bytes`."""

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._buffer = bytearray()
        self._seen = 0  # bytes already searched for a NUL
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Frames completed by `data`; empty pieces are ignored."""
        return map(self._parse, self.split(data))

    def split(self, data: bytes) -> Iterator[bytes]:
        """The same, not parsed and without their NUL."""
        self._buffer += data
        while (end := self._buffer.find(b"\0", self._seen)) >= 0:
            piece = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._seen = 0
            if piece.strip():
                yield piece
        self._seen = len(self._buffer)
        if self._seen > self._max_bytes:
            raise ValueError(f"a frame is larger than {self._max_bytes} bytes")

    def close(self) -> Iterator[dict[str, Any]]:
        """At the end of the body: a last frame without its NUL, which some servers leave out."""
        piece = bytes(self._buffer)
        self._buffer.clear()
        if piece.strip():
            yield self._parse(piece)

    @staticmethod
    def _parse(piece: bytes) -> dict[str, Any]:
        frame = json.loads(piece)
        if not isinstance(frame, dict):
            raise ValueError("a frame is not a JSON object")
        return frame


class Body(BaseModel):
    """Every request body: unknown keys are ignored, and numbers are finite numbers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class ModelInfo(Body):
    """What a client may want to know about a model; workers of other projects send none of it."""

    conv_template: str | None = Field(default=None, max_length=64)
    context_length: Count = 2048
    image_tokens: Count = 0  # per picture; 0: the model takes text only
    max_new_tokens: Count = 1024
    max_images: Count = 16


class WorkerStatus(Body):
    """`/worker_get_status`; the first three keys are the published ones."""

    model_names: list[Name] = Field(max_length=64)
    speed: float = Field(strict=True, ge=0, le=1e6)
    queue_length: float = Field(strict=True, ge=0, le=2**31)
    state: State = "ready"
    loading: list[Name] = Field(default=[], max_length=64)  # models on their way
    progress: int | None = Field(default=None, ge=0, le=100)  # percent of their weights that has been read
    features: list[Name] = Field(default=[], max_length=32)  # "delta", "messages"
    info: ModelInfo | None = None


class RegisterBody(Body):
    """`/register_worker`."""

    worker_name: str = Field(max_length=512)
    check_heart_beat: bool
    worker_status: WorkerStatus | None = None

    @field_validator("worker_status")
    @classmethod
    def _must_do_something(cls, status: WorkerStatus | None) -> WorkerStatus | None:
        if status is not None and status.speed == 0:
            raise ValueError("speed must be greater than 0")
        return status


class NameBody(Body):
    """`/unregister_worker`."""

    worker_name: str = Field(max_length=512)


class HeartBeatBody(NameBody):
    """`/receive_heart_beat`."""

    queue_length: float = Field(strict=True, ge=0, le=2**31)


class AddressBody(Body):
    """`/get_worker_address`."""

    model: str = Field(max_length=256)


class Message(Body):
    """One turn of `messages`; `<image>` in `content` stands for the next picture of `images`."""

    role: Role
    content: str


class GenerateBody(Body):
    """`/worker_generate_stream`. `stream_mode` "delta" asks for new text only; `messages` repeat the prompt as turns.

    `org_images` and `max_input_tiles`, which some clients send, are ignored like any other unknown key.
    """

    model: str = Field(default="", max_length=256)
    prompt: str = Field(max_length=4_000_000)
    images: list[str] = Field(default=[], max_length=64)
    temperature: float = Field(default=1.0, strict=True, ge=0, le=100)
    top_p: float = Field(default=1.0, strict=True, gt=0, le=1)
    max_new_tokens: int = Field(default=256, strict=True, ge=1, le=1_000_000)
    stop: list[str] = Field(default=[], max_length=MAX_STOPS)
    seed: int | None = Field(default=None, strict=True, ge=0, lt=2**63)
    stream_mode: Literal["cumulative", "delta"] = "cumulative"
    messages: list[Message] | None = Field(default=None, max_length=2048)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        return data

    @field_validator("stop")
    @classmethod
    def _usable_stops(cls, stops: list[str]) -> list[str]:
        if any(len(text) > 256 for text in stops):
            raise ValueError("a stop string has more than 256 characters")
        return [text for text in stops if text]


class WorkerView(Body):
    """One entry of the controller's `/list_workers`: what the web page may show, without addresses."""

    models: list[Name]
    loading: list[Name]
    progress: int | None = None
    state: State
    queue_length: float
    features: list[Name]
    info: ModelInfo | None
