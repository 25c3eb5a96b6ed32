"""The OpenAI-compatible API: `/v1/models` and `/v1/chat/completions`, over whatever workers the controller has.

    client = openai.OpenAI(base_url="http://localhost:10000/v1", api_key="…")

Streams or not; text and several images (data URIs, and https addresses where allowed); errors in OpenAI's shape, also
within streams.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from llava.conversation import template_for
from llava.download import download
from llava.errors import ImageError
from llava.serve.common.middleware import forget_body, openai_error, request_id_of
from llava.serve.common.openai_prompt import Rendered, render
from llava.serve.common.openai_schema import ChatBody
from llava.serve.common.protocol import ErrorType, ServeError
from llava.serve.common.security import RateLimiter, bearer
from llava.serve.common.streaming import LaterResponse, StreamResponse
from llava.serve.control.app import Controller
from llava.serve.control.worker_client import WorkerStream

_IMAGE_BYTES: Final = 20 * 2**20
_CREATED: Final = 1_700_000_000  # models have no date of their own; clients want one that does not change


class ApiServer:
    """Turns chat requests into worker requests and their frames into OpenAI's objects."""

    def __init__(
        self,
        controller: Controller,
        rate_limit: float | None = None,
        *,
        allow_urls: bool = False,
        unsafe_local: bool = False,
    ) -> None:
        self.controller = controller
        self.limiter = RateLimiter(rate_limit) if rate_limit else None
        self.allow_urls = allow_urls
        self.unsafe_local = unsafe_local  # for tests, see `llava.download`
        self._fetching = asyncio.Semaphore(4)

    def models(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": _CREATED, "owned_by": "llava"}
            for name in self.controller.registry.models()
        ]

    def spend(self, request: Request) -> None:
        """Count the request against its key or, without keys, its address; `ServeError` (429) when it is too many."""
        if self.limiter is None:
            return
        client = request.client.host if request.client else ""
        header = request.headers.get("authorization", "").encode("latin-1")
        wait = self.limiter.spend(bearer(header) or client.encode())
        if wait:
            message = f"More than {self.limiter.per_minute:g} requests a minute; try again in {wait:.0f} seconds."
            raise ServeError(ErrorType.RATE_LIMITED, message, retry_after=wait)

    async def complete(self, body: ChatBody, request: Request) -> Response:
        """Answer a chat request."""
        forget_body(request)
        self.spend(request)
        request_id = request_id_of(request)
        status = self.controller.registry.status_of(body.model)
        if status is None:
            kind = ErrorType.NOT_FOUND
            raise ServeError(kind, "No worker serves this model now; see /v1/models.", param="model")
        info = status.info
        template = (info.conv_template if info else None) or template_for(None, body.model)
        rendered = render(body.messages, template)
        images = [await self._picture(address) for address in rendered.pictures]
        limit = info.max_new_tokens if info else 1024
        content = json.dumps(
            {
                "model": body.model,
                "prompt": rendered.prompt,
                "messages": [message.model_dump() for message in rendered.messages],
                "images": images,
                "temperature": body.temperature,
                "top_p": body.top_p,
                "max_new_tokens": min(body.max_new_tokens or limit, limit),
                "stop": [*rendered.stop, *body.stop],
                "seed": body.seed,
                "stream_mode": "delta",
            }
        ).encode()
        upstream = await self.controller.open(body.model, content, request_id)
        reply = Reply(body, rendered, upstream, request_id)
        close = self.controller.closer(upstream, reply.outcome)
        if body.stream:
            return StreamResponse(reply.events(), close, media_type="text/event-stream")
        return LaterResponse(reply.whole(), close)

    async def _picture(self, address: str) -> str:
        """Base64 of a picture that came as a data URI or, where allowed, is behind an https address."""
        scheme, _, rest = address.partition(":")
        if scheme == "data":
            kind, comma, data = rest.partition(",")
            if not comma or not kind.startswith("image/") or not kind.endswith(";base64"):
                raise _bad_image("An image's data URI must look like data:image/png;base64,….")
            return data
        if scheme not in ("http", "https"):
            raise _bad_image("An image must come as a data URI; paths and other addresses are not opened.")
        if not self.allow_urls:
            raise _bad_image("Image addresses are not fetched here; send the image as a data URI.")
        async with self._fetching:
            try:
                content = await asyncio.to_thread(download, address, _IMAGE_BYTES, unsafe_local=self.unsafe_local)
            except ImageError as error:
                raise _bad_image("The image cannot be fetched; only https addresses of public hosts are.") from error
        return base64.b64encode(content).decode()


def _bad_image(message: str) -> ServeError:
    return ServeError(ErrorType.BAD_IMAGE, message, param="messages")


class Reply:
    """One answer in OpenAI's shapes. `outcome` holds one word for the metrics."""

    def __init__(self, body: ChatBody, rendered: Rendered, upstream: WorkerStream, request_id: str) -> None:
        self.model = body.model
        self.include_usage = body.stream_options.include_usage
        self.prompt = rendered.prompt
        self.upstream = upstream
        self.request_id = request_id
        self.created = int(time.time())
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None  # of a worker that does not tell
        self.outcome = ["cancelled"]
        self._shown = ""

    async def _texts(self) -> AsyncGenerator[str, None]:
        """New text as it comes. Workers that only send all text so far begin every frame with the prompt."""
        async with aclosing(self.upstream.frames()) as frames:
            async for raw in frames:
                frame = self._parse(raw)
                text = str(frame.get("text", ""))
                if self._shown or text.startswith(self.prompt):
                    answer = text.removeprefix(self.prompt).lstrip()
                    text, self._shown = answer[len(self._shown) :], answer or self._shown
                if text:
                    yield text
                if frame.get("finish_reason"):
                    with _understood():
                        self._finish(frame)
        self.finish_reason = self.finish_reason or "stop"
        self.outcome[0] = self.finish_reason

    def _parse(self, raw: bytes) -> dict[str, Any]:
        with _understood():
            frame = json.loads(raw)
            code, told = int(frame["error_code"]), dict(frame.get("error") or {})
        if code:
            raise ServeError(ErrorType.from_wire(told.get("type")), str(told.get("message") or frame.get("text", "")))
        parsed: dict[str, Any] = frame
        return parsed

    def _finish(self, frame: dict[str, Any]) -> None:
        reason = frame["finish_reason"]
        self.finish_reason = "length" if reason in ("length", "context_exceeded") else "stop"
        counts = {key: int(value) for key, value in (frame.get("usage") or {}).items()}
        if not counts:
            return
        prompt, completion = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
        self.usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if "image_tokens" in counts:
            self.usage["prompt_tokens_details"] = {"image_tokens": counts["image_tokens"]}

    async def whole(self) -> Response:
        """The answer in one object; raises `ServeError`."""
        try:
            text = "".join([piece async for piece in self._texts()])
        except ServeError as error:
            self.outcome[0] = error.kind.wire
            raise
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], "usage": self.usage})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, `[DONE]` last, also after an error."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for text in _closing(self._texts()):
                yield self._chunk({"content": text})
            yield self._chunk({}, self.finish_reason)
            if self.include_usage:
                yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage})
        except ServeError as error:
            self.outcome[0] = error.kind.wire
            yield _event({"error": openai_error(error, self.request_id)})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.request_id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice]})


@contextmanager
def _understood() -> Iterator[None]:
    """What a worker sends may be anything."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker sent something that is no frame.") from error


async def _closing(texts: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(texts):
        async for text in texts:
            yield text


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def add_api_routes(app: FastAPI, server: ApiServer) -> None:
    """Add the API to the controller's application."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        for entry in server.models():
            if entry["id"] == name:
                return entry
        raise ServeError(ErrorType.NOT_FOUND, "No worker serves this model now; see /v1/models.", param="model")

    @app.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await server.complete(body, request)
