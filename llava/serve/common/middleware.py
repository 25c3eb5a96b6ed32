"""What every serving process has around its routes: request ids, the guard, body limits, error bodies, health."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.common.metrics import Metrics
from llava.serve.common.protocol import FRAME_MEDIA_TYPE, ErrorType, ServeError, encode_frame
from llava.serve.common.security import OPEN_PATHS, ApiKeys, bearer

logger = logging.getLogger(__name__)

STREAM_PATH: Final = "/worker_generate_stream"
API_PREFIX: Final = "/v1/"
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SHAPE_ERRORS: Final = ("missing", "json_invalid", "model_attributes_type", "model_type", "dict_type")
_INTERNAL: Final = "Something went wrong here; the log of this service has the details under the request id."


@dataclass(frozen=True)
class Limits:
    """What a request may cost before its route sees it: bytes of the body, and seconds until it is complete."""

    max_body: int = 32 * 2**20
    max_small_body: int = 2**20  # of routes that carry no pictures
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Keys:
    """Who may call: `cluster` guards every route but the open ones; `api` (or the cluster's) opens `/v1/`."""

    cluster: ApiKeys = field(default_factory=ApiKeys)
    api: ApiKeys = field(default_factory=ApiKeys)

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise `ServeError` (401) unless the credential fits the path."""
        rings = [self.api, self.cluster] if path.startswith(API_PREFIX) else [self.cluster]
        rings = [ring for ring in rings if ring]
        if path in OPEN_PATHS or not rings:
            return
        credential = bearer(headers.get(b"authorization", b""))
        if not any(ring.accepts(credential) for ring in rings):
            raise ServeError(
                ErrorType.UNAUTHORIZED, "The key is missing or wrong; send it as Authorization: Bearer KEY."
            )


def error_response(error: ServeError, path: str, request_id: str) -> Response:
    """The answer to a refused request: a frame where frames are expected, OpenAI's shape below `/v1/`."""
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.kind is ErrorType.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    frame = {**error.frame(request_id), "detail": error.message}
    if path.startswith(API_PREFIX):
        return JSONResponse({"error": openai_error(error, request_id)}, error.kind.status, headers)
    if path == STREAM_PATH:
        # The published protocol says 200 for what only the controller can say (codes 2 and 3).
        status = 200 if error.kind.error_code in (2, 3) else error.kind.status
        return Response(encode_frame(frame), status, headers, FRAME_MEDIA_TYPE)
    return Response(json.dumps(frame), error.kind.status, headers, "application/json")


def openai_error(error: ServeError, request_id: str) -> dict[str, Any]:
    """`error` as OpenAI's clients expect it."""
    kind = "invalid_request_error" if error.kind.status < 500 else "server_error"
    return {
        "message": error.message,
        "type": kind,
        "param": error.facts.get("param"),
        "code": error.kind.wire,
        "request_id": request_id,
        **{key: value for key, value in error.facts.items() if key != "param"},
    }


class RequestMiddleware:
    """The outermost layer: gives the request its id, checks its key, reads its body within limits, logs and counts it.

    No path, header, query or body of a client enters the log: only the route's own name.
    """

    def __init__(self, app: FastAPI, keys: Keys, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"")
        request_id = sent.decode() if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self.keys.check(scope["path"], headers)
            await self.app(scope, await self._with_body(scope, headers, receive), tagged)
        except ServeError as error:
            if not status:
                await error_response(error, scope["path"], request_id)(scope, receive, tagged)
        except Exception:  # the outermost guard of the process: the client got a 500 without details, the log has them
            logger.exception("request_id=%s failed", request_id)
            if not status:
                answer = error_response(ServeError(ErrorType.INTERNAL, _INTERNAL), scope["path"], request_id)
                await answer(scope, receive, tagged)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.http.labels(route, str(status)).inc()
            milliseconds = 1000 * (time.monotonic() - started)
            logger.info("request_id=%s route=%s status=%d ms=%.0f", request_id, route, status, milliseconds)

    async def _with_body(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
        """A `receive` that gives the whole body, read here, at once; later calls wait for the disconnect."""
        pictures = scope["path"] == STREAM_PATH or scope["path"].startswith(API_PREFIX)
        limit = self.limits.max_body if pictures else self.limits.max_small_body
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        try:
            body = await asyncio.wait_for(_read(receive, limit), self.limits.body_seconds)
        except asyncio.TimeoutError as error:
            raise ServeError(
                ErrorType.BODY_TOO_SLOW, f"The body did not arrive within {self.limits.body_seconds:g} seconds."
            ) from error
        waiting = [body]  # whoever asks for it gets the only copy

        async def replay() -> Message:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

        return replay


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ServeError(ErrorType.BAD_REQUEST, "The connection closed before the body was complete.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(limit: int) -> ServeError:
    return ServeError(ErrorType.BODY_TOO_LARGE, f"The body has more than {limit} bytes; send smaller pictures.")


def forget_body(request: Request) -> None:
    """Free what Starlette keeps of a body that was read, as bytes and parsed: an answer may take minutes."""
    for kept in ("_body", "_json"):
        request.__dict__.pop(kept, None)


def request_id_of(request: Request) -> str:
    """The id that `RequestMiddleware` gave this request."""
    return str(getattr(request.state, "request_id", ""))


async def _on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, request.url.path, request_id_of(request))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Say where and why, never what was sent."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[:5]
    where = "; ".join(f"{'.'.join(map(str, e['loc'][:4]))}: {e['msg'].removeprefix('Value error, ')}" for e in found)
    param = found[0].get("ctx", {}).get("param") or next(iter(found[0]["loc"][1:]), None)
    if not isinstance(error.body, dict):
        where, param = "the body must be a JSON object, sent with Content-Type: application/json", None
    refusal = ServeError(ErrorType.BAD_REQUEST, f"The request cannot be used: {where[:500]}.", param=param)
    answer = error_response(refusal, request.url.path, request_id_of(request))
    if not request.url.path.startswith(API_PREFIX) and any(e["type"] in _SHAPE_ERRORS for e in found):
        answer.status_code = 422
    return answer


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body: dict[str, Any] = {"detail": error.detail}
    if request.url.path.startswith(API_PREFIX):
        body = {"error": {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}}
    return Response(json.dumps(body), error.status_code, error.headers, "application/json")


async def _on_defect(request: Request, error: Exception) -> Response:
    return error_response(ServeError(ErrorType.INTERNAL, _INTERNAL), request.url.path, request_id_of(request))


def make_app(title: str, metrics: Metrics, readiness: Callable[[], str]) -> FastAPI:
    """An application with error handlers, `/health`, `/ready` and `/metrics`.

    `readiness` returns why the service cannot serve now, or nothing.
    """
    app = FastAPI(title=title)
    app.add_exception_handler(ServeError, _on_serve_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses={503: {}})
    async def ready() -> JSONResponse:
        reason = readiness()
        return JSONResponse({"ready": not reason, "reason": reason}, 503 if reason else 200)

    @app.get("/metrics")
    async def render_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def guard(app: FastAPI, keys: Keys, limits: Limits, metrics: Metrics) -> ASGIApp:
    """`app` behind its `RequestMiddleware`."""
    return RequestMiddleware(app, keys, limits, metrics)
