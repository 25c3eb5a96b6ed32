"""What the web page says when something fails: one sentence for each cause, never one for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llava.serve.common.protocol import ErrorType, FrameReader, ServeError

SENTENCES: Final = {
    ErrorType.BAD_REQUEST: "The worker does not accept this request.",
    ErrorType.BAD_IMAGE: "The worker cannot read one of the pictures.",
    ErrorType.IMAGE_COUNT_MISMATCH: "The number of pictures and of <image> placeholders differ.",
    ErrorType.CONTEXT_TOO_LONG: "The conversation is longer than the model can read; clear it or ask more briefly.",
    ErrorType.UNAUTHORIZED: "This web server has no access to the worker; its operator has to give it the token.",
    ErrorType.NOT_FOUND: "No worker serves this model at the moment; choose another model, or wait for its worker.",
    ErrorType.BODY_TOO_SLOW: "Sending the message took too long; try again.",
    ErrorType.BODY_TOO_LARGE: "The message with its pictures is larger than the worker accepts; send smaller pictures.",
    ErrorType.RATE_LIMITED: "Too many messages in a short time; wait a moment and try again.",
    ErrorType.OUT_OF_MEMORY: "The worker ran out of memory on this request; send a shorter one or fewer pictures.",
    ErrorType.INTERNAL: "The worker failed on this request; its log says why.",
    ErrorType.WORKER_UNAVAILABLE: "The worker of this model cannot be reached; try again when it is back.",
    ErrorType.OVERLOADED: "The model is answering as many people as it can (high traffic); try again in a moment.",
    ErrorType.NOT_READY: "The worker is starting or stopping; try again in a moment.",
    ErrorType.TIMEOUT: "The worker did not answer in time; try again.",
}
# What workers of other projects say for every failure; repeating it would mislead.
_SAYS_NOTHING: Final = ("HIGH TRAFFIC", "UNKNOWN ERROR")


def explain(error: ServeError) -> str:
    """The sentence for a failure, what the other side said about it, and its code."""
    parts = [SENTENCES[error.kind]]
    message = " ".join(error.message.split())
    if message and not any(empty in message.upper() for empty in _SAYS_NOTHING):
        parts.append(f"({message})")
    request_id = error.facts.get("request_id")
    code = f"error_code: {error.facts.get('error_code', error.kind.error_code)}, {error.kind.wire}"
    parts.append(f"({code}, request {request_id})" if request_id else f"({code})")
    return " ".join(parts)


def from_frame(frame: Mapping[str, Any]) -> ServeError | None:
    """The failure that a frame reports; None for one that carries an answer.

    The type decides where there is one; a worker of another project sends only a code: 2 without worker, 3 when the
    worker broke off, anything else is its own failure.
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
    facts = {"error_code": code, **({"request_id": details["request_id"]} if "request_id" in details else {})}
    return ServeError(kind, str(details.get("message") or (frame.get("text") if code else "") or ""), **facts)


def from_response(status: int, body: bytes) -> ServeError:
    """The failure in an HTTP answer that is not 200: its frame if it has one, else what its status means."""
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
    """FastAPI's `detail`, when the body has one that is text."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {detail[:200]}" if isinstance(detail, str) else ""
