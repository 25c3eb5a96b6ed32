"""Application base of every server: request ids, authentication, body limits, error bodies, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.errors import ConfigError
from llava.serve.common.protocol import FRAME_MEDIA_TYPE, ErrorType, Frame, ServeError, encode_frame
from llava.serve.common.security import OPEN_PATHS, ApiKeys, bearer

logger = logging.getLogger(__name__)

STREAM_PATH: Final = "/worker_generate_stream"
API_PREFIX: Final = "/v1/"
_API_PATHS: Final = ("/tokenize", "/detokenize")  # of the API, at the same paths as in vLLM
_LARGE_PATHS: Final = (STREAM_PATH, "/worker_tokenize", "/worker_detokenize")  # take the prompts of the API
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")
_SHAPE_ERRORS: Final = ("missing", "json_invalid", "model_attributes_type", "model_type", "dict_type")
_INTERNAL: Final = "Internal error; see the log of this service for the request id."
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def is_api(path: str) -> bool:
    """Whether a path belongs to the OpenAI-compatible API, with its keys and error format."""
    return path.startswith(API_PREFIX) or path in _API_PATHS


@dataclass(frozen=True)
class Limits:
    """Limits of request bodies, in bytes and in seconds until the body is complete."""

    max_body: int = 32 * 2**20
    max_small_body: int = 2**20  # of routes without prompts
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Keys:
    """Keys of a server: `cluster` protects every route except the open ones; the API also accepts `api`."""

    cluster: ApiKeys = field(default_factory=ApiKeys)
    api: ApiKeys = field(default_factory=ApiKeys)

    @classmethod
    def from_secrets(cls, token: str | None, api_keys: Sequence[str] = ()) -> Keys:
        """Keys from the shared token and the API keys."""
        return cls(ApiKeys([token] if token else []), ApiKeys(api_keys))

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise `ServeError` (401) unless the credential is valid for the path."""
        accepted = [keys for keys in (self.cluster, self.api if is_api(path) else None) if keys]
        if path in OPEN_PATHS or not accepted:
            return
        credential = bearer(headers.get(b"authorization", b""))
        if not any(keys.accepts(credential) for keys in accepted):
            raise ServeError(ErrorType.UNAUTHORIZED, "Missing or invalid key; send Authorization: Bearer KEY.")


class Metrics:
    """Prometheus counters and gauges of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "llava_requests", "Number of generation requests, by outcome", ["outcome"], registry=registry
        )
        self.http = Counter(
            "llava_http", "Number of HTTP requests, by path and status", ["path", "status"], registry=registry
        )
        self.tokens = Counter("llava_tokens", "Number of tokens, by kind", ["kind"], registry=registry)
        self.seconds = Histogram(
            "llava_request_seconds", "Seconds from request to last token", buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "llava_first_token_seconds", "Seconds from request to first token", buckets=_SECONDS, registry=registry
        )

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is `read()` at every scrape."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def error_response(error: ServeError, path: str, request_id: str) -> Response:
    """Response to a refused request: OpenAI's error object in the API, else a frame."""
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.kind is ErrorType.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    frame: Frame = {**error.frame(request_id), "detail": error.message}
    if is_api(path):
        return JSONResponse({"error": openai_error(error, request_id, path)}, error.kind.status, headers)
    if path == STREAM_PATH:
        # The published protocol sends the controller's errors (codes 2 and 3) with status 200.
        status = 200 if error.kind.error_code in (2, 3) else error.kind.status
        return Response(encode_frame(frame), status, headers, FRAME_MEDIA_TYPE)
    return Response(json.dumps(frame), error.kind.status, headers, "application/json")


# The errors that OpenAI's clients know by another code, with their type.
_OPENAI_CODES: Final = {
    ErrorType.UNAUTHORIZED: ("invalid_api_key", "invalid_request_error"),
    ErrorType.RATE_LIMITED: ("rate_limit_exceeded", "requests"),
    ErrorType.BAD_IMAGE: ("invalid_image", "invalid_request_error"),
}
_INPUTS: Final = {"/v1/completions": "prompt", "/v1/responses": "input", "/detokenize": "tokens"}


def openai_error(error: ServeError, request_id: str, path: str) -> dict[str, object]:
    """`error` as OpenAI's error object; `error_type` is this project's own code."""
    kind = "invalid_request_error" if error.kind.status < 500 else "server_error"
    code, kind = _OPENAI_CODES.get(error.kind, (error.kind.wire, kind))
    facts = {"param": None, **error.facts}
    message, given = error.message, _INPUTS.get(path, "messages")
    if facts["param"] == "messages":
        facts["param"] = given
    if error.kind is ErrorType.CONTEXT_TOO_LONG:  # LiteLLM recognizes these words, LangChain the code in the message
        facts["param"] = given
        start = "This model's maximum context length is"
        if "context_length" in facts and "prompt_tokens" in facts:
            start += f" {facts['context_length']} tokens. However, you requested {facts['prompt_tokens']} tokens"
            message = f"{start} in the {given}. {message}"
        elif start.lower() not in message.lower():
            message = f"{start} exceeded. {message}"
        message = message if code in message else f"{message} [{code}]"
    names = {"type": kind, "code": code, "error_type": error.kind.wire}
    return {"message": message, **names, "request_id": request_id, **facts}


class RequestMiddleware:
    """Outermost ASGI layer: assigns request ids, checks keys, reads bodies within limits, logs and counts requests.

    The log contains the name of the route, never a client's path, header, query or body.
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
        scope, headers = _normalized(scope), dict(scope["headers"])
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
        except Exception:  # outermost handler: a 500 without details for the client, the traceback for the log
            logger.exception("request_id=%s failed", request_id)
            if not status:
                response = error_response(ServeError(ErrorType.INTERNAL, _INTERNAL), scope["path"], request_id)
                await response(scope, receive, tagged)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.http.labels(route, str(status)).inc()
            milliseconds = 1000 * (time.monotonic() - started)
            logger.info("request_id=%s route=%s status=%d ms=%.0f", request_id, route, status, milliseconds)

    async def _with_body(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
        """Check the headers of the body, and read it, see `buffered`."""
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding not in ("", "identity"):
            raise ServeError(ErrorType.UNSUPPORTED_ENCODING, "Compressed bodies are not supported; send plain JSON.")
        has_prompt = scope["path"] in _LARGE_PATHS or is_api(scope["path"])
        limit = self.limits.max_body if has_prompt else self.limits.max_small_body
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        return await buffered(receive, limit, self.limits.body_seconds)


def _normalized(scope: Scope) -> Scope:
    """A copy for the application: HEAD as GET, whose body the server omits, and `/v1/models/` as `/v1/models`."""
    path, method = scope["path"], scope["method"]
    path = path.rstrip("/") if path.startswith(API_PREFIX) and path != API_PREFIX else path
    return {**scope, "path": path, "method": "GET" if method == "HEAD" else method}


class CrossOrigin:
    """Outermost ASGI layer of a controller with `--allowed-origins`: answers preflights, adds CORS headers to the API.

    A preflight has no key. Cookies are never used; all other routes stay closed to scripts of other origins.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app = app
        exposed = ["x-request-id", "retry-after"]
        methods = ["GET", "POST"]
        self.api = CORSMiddleware(app, origins, methods, allow_headers=["*"], expose_headers=exposed, max_age=3600)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.api if scope["type"] == "http" and is_api(scope["path"]) else self.app
        await app(scope, receive, send)


def check_origins(values: Sequence[str]) -> list[str]:
    """The origins of `--allowed-origins`; also accepts vLLM's form, one JSON list. Raises `ConfigError`."""
    origins = list(values)
    if len(origins) == 1 and origins[0].lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            origins = [str(each) for each in json.loads(origins[0])]
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"--allowed-origins must be https://HOST, http://HOST:PORT or *, got {origin!r}.")
    return origins


async def buffered(receive: Receive, limit: int, seconds: float) -> Receive:
    """Read the whole body; returns a `receive` that yields it once and then waits for the disconnect.

    Raises `ServeError` for a body of more than `limit` bytes, or one that takes longer than `seconds`.
    """
    try:
        pending = [await asyncio.wait_for(_read(receive, limit), seconds)]  # popped, so that no copy is kept
    except asyncio.TimeoutError as error:
        text = f"The body did not arrive within {seconds:g} seconds."
        raise ServeError(ErrorType.BODY_TOO_SLOW, text) from error

    async def replay() -> Message:
        return {"type": "http.request", "body": pending.pop(), "more_body": False} if pending else await receive()

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
    return ServeError(ErrorType.BODY_TOO_LARGE, f"The body is larger than {limit} bytes; send smaller images.")


def release_body(request: Request) -> None:
    """Free the copies of the body that Starlette caches on the request, which lives as long as the answer."""
    for name in ("_body", "_json"):
        request.__dict__.pop(name, None)


def request_id_of(request: Request) -> str:
    """The id that `RequestMiddleware` assigned."""
    return str(getattr(request.state, "request_id", ""))


async def _on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, request.url.path, request_id_of(request))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Report the fields and the reasons, never the submitted values."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[:5]
    where = "; ".join(f"{'.'.join(map(str, e['loc'][:4]))}: {e['msg'].removeprefix('Value error, ')}" for e in found)
    param = found[0].get("ctx", {}).get("param") or next(iter(found[0]["loc"][1:]), None)
    if not isinstance(error.body, dict):
        where, param = "the body must be a JSON object, sent with Content-Type: application/json", None
        where += _received(request, found[0])
    refusal = ServeError(ErrorType.BAD_REQUEST, f"Invalid request: {where[:500]}.", param=param)
    response = error_response(refusal, request.url.path, request_id_of(request))
    if not is_api(request.url.path) and any(e["type"] in _SHAPE_ERRORS for e in found):
        response.status_code = 422
    return response


def _received(request: Request, problem: Mapping[str, Any]) -> str:
    """What a request contained in place of a JSON object, without any of it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if problem["type"] == "json_invalid":
        return f"; it is not valid JSON at character {problem['loc'][-1]}"
    if problem["type"] == "missing":
        return "; it is empty"
    return "" if kind == "application/json" or kind.endswith("+json") else "; the Content-Type is another one"


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, UnicodeDecodeError | RecursionError):  # of FastAPI, when it parses the body
        fault = "nested too deeply" if isinstance(error.__cause__, RecursionError) else "not encoded in UTF-8"
        refusal = ServeError(ErrorType.BAD_REQUEST, f"The JSON of the body is {fault}.")
        return error_response(refusal, request.url.path, request_id_of(request))
    body: dict[str, object] = {"detail": error.detail}
    if is_api(request.url.path):
        code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
        message = f"{error.detail}; {_api_routes(request.app)}." if code else error.detail
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Response(json.dumps(body), error.status_code, error.headers, "application/json")


def _api_routes(app: FastAPI) -> str:
    """What to request instead of an unknown route of the API."""
    routes = [route for route in app.routes if isinstance(route, APIRoute) and is_api(route.path)]
    known = [f"{method} {route.path_format}" for route in routes for method in sorted(route.methods or ())]
    return f"the routes of the API are {', '.join(known)}" if known else "the controller serves the API"


async def _on_exception(request: Request, error: Exception) -> Response:
    return error_response(ServeError(ErrorType.INTERNAL, _INTERNAL), request.url.path, request_id_of(request))


def make_app(title: str, metrics: Metrics, readiness: Callable[[], str]) -> FastAPI:
    """Create an application with error handlers, `/health`, `/ready` and `/metrics`.

    `readiness` returns the reason why the service cannot serve now, empty when it can.
    """
    app = FastAPI(title=title)
    app.add_exception_handler(ServeError, _on_serve_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_exception)

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
