"""Error messages of the web page, one for each cause."""

from __future__ import annotations

import json
from typing import Final

from llava.serve.common.protocol import ErrorType, Frame, FrameReader, ServeError

SENTENCES: Final = {
    ErrorType.BAD_REQUEST: "The worker rejected this request.",
    ErrorType.BAD_IMAGE: "The worker cannot read one of the images.",
    ErrorType.IMAGE_COUNT_MISMATCH: "The numbers of images and <image> placeholders differ.",
    ErrorType.CONTEXT_TOO_LONG: "The conversation exceeds the model's context length; clear it or shorten the message.",
    ErrorType.UNAUTHORIZED: "This web server is not authorized at the worker; its operator must set the token.",
    ErrorType.NOT_FOUND: "No worker serves this model at the moment; select another model, or try again later.",
    ErrorType.BODY_TOO_SLOW: "Sending the message timed out; try again.",
    ErrorType.BODY_TOO_LARGE: "The message is larger than the worker accepts; send smaller images.",
    ErrorType.UNSUPPORTED_ENCODING: "The worker does not accept the encoding of this request.",
    ErrorType.RATE_LIMITED: "Too many messages; try again in a moment.",
    ErrorType.OUT_OF_MEMORY: "The worker ran out of memory; send a shorter message or fewer images.",
    ErrorType.INTERNAL: "The worker failed on this request; its log has the details.",
    ErrorType.WORKER_UNAVAILABLE: "The worker of this model cannot be reached; try again later.",
    ErrorType.OVERLOADED: "The model is busy (high traffic); try again in a moment.",
    ErrorType.NOT_READY: "The worker is starting or stopping; try again in a moment.",
    ErrorType.TIMEOUT: "The worker did not answer in time; try again.",
}
# Messages that workers of other projects send for every failure.
_GENERIC: Final = ("HIGH TRAFFIC", "UNKNOWN ERROR")


def explain(error: ServeError) -> str:
    """Message for a visitor: the sentence of the error type, details and code."""
    parts = [SENTENCES[error.kind]]
    message = " ".join(error.message.split())
    if message and not any(text in message.upper() for text in _GENERIC):
        parts.append(f"({message})")
    request_id = error.facts.get("request_id")
    code = f"error_code: {error.facts.get('error_code', error.kind.error_code)}, {error.kind.wire}"
    parts.append(f"({code}, request {request_id})" if request_id else f"({code})")
    return " ".join(parts)


def from_frame(frame: Frame) -> ServeError | None:
    """The error that a frame reports, None for a frame of an answer.

    Frames of other projects have a code instead of an error type: 2 without a worker, 3 when the worker cannot be
    reached, other codes for failures of the worker.
    """
    code = frame.get("error_code", 0)
    reason = frame.get("finish_reason")
    if not code and reason not in ("error", "context_exceeded"):
        return None
    details = frame.get("error")
    details = details if isinstance(details, dict) else {}
    if reason == "context_exceeded":
        kind = ErrorType.CONTEXT_TOO_LONG
    elif "type" in details:
        kind = ErrorType.from_wire(details["type"])
    else:
        kind = {2: ErrorType.NOT_FOUND, 3: ErrorType.WORKER_UNAVAILABLE}.get(code, ErrorType.INTERNAL)
    error = ServeError(kind, str(details.get("message") or (frame.get("text") if code else "") or ""), error_code=code)
    if "request_id" in details:
        error.facts["request_id"] = details["request_id"]
    return error


def from_response(status: int, body: bytes) -> ServeError:
    """The error of an HTTP response with a status other than 200: of its frame, else of its status."""
    try:
        frames = [frame for reader in [FrameReader()] for part in (reader.feed(body), reader.close()) for frame in part]
        error = from_frame(frames[0]) if frames else None
    except (ValueError, RecursionError):
        error = None
    if error is not None:
        return error
    kind = next((kind for kind in ErrorType if kind.status == status), None)
    if kind is None:
        kind = ErrorType.INTERNAL if status >= 500 else ErrorType.BAD_REQUEST
    return ServeError(kind, f"HTTP status {status}{_detail(body)}")


def _detail(body: bytes) -> str:
    """FastAPI's `detail`, if it is text."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {detail[:200]}" if isinstance(detail, str) else ""
