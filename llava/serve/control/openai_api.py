"""OpenAI-compatible API of the controller: `/v1/models` and `/v1/chat/completions`.

    client = openai.OpenAI(base_url="http://localhost:10000/v1", api_key="…")

Supports streaming, text and several images (data URIs, and https addresses where allowed). Errors are OpenAI's error
objects, also within streams.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from llava.conversation import template_for
from llava.download import download
from llava.errors import ImageError
from llava.serve.common.middleware import openai_error, release_body, request_id_of
from llava.serve.common.openai_chat import ChatBody, RenderedChat, render_chat
from llava.serve.common.protocol import ErrorType, Frame, ServeError
from llava.serve.common.security import RateLimiter, bearer
from llava.serve.common.streaming import DeferredResponse, StreamResponse
from llava.serve.control.app import ControllerService
from llava.serve.control.worker_client import WorkerStream

_IMAGE_BYTES: Final = 20 * 2**20
_CREATED: Final = 1_700_000_000  # constant, since models have no creation date


class OpenAIServing:
    """Converts chat requests to worker requests, and worker frames to OpenAI objects.

    `rate_limit` is in requests per minute and client; `allow_urls` permits fetching https images.
    """

    def __init__(
        self,
        controller: ControllerService,
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

    def models(self) -> list[dict[str, object]]:
        return [
            {"id": name, "object": "model", "created": _CREATED, "owned_by": "llava"}
            for name in self.controller.registry.models()
        ]

    def spend(self, request: Request) -> None:
        """Charge the request to its key, or without keys to its address; `ServeError` (429) above the rate limit."""
        if self.limiter is None:
            return
        client = request.client.host if request.client else ""
        header = request.headers.get("authorization", "").encode("latin-1")
        wait = self.limiter.spend(bearer(header) or client.encode())
        if wait:
            message = (
                f"Rate limit of {self.limiter.per_minute:g} requests per minute exceeded; retry in {wait:.0f} seconds."
            )
            raise ServeError(ErrorType.RATE_LIMITED, message, retry_after=wait)

    async def complete(self, body: ChatBody, request: Request) -> Response:
        """Respond to a chat request."""
        release_body(request)
        self.spend(request)
        request_id = request_id_of(request)
        status = self.controller.registry.status_of(body.model)
        if status is None:
            raise _unknown_model()
        info = status.info
        template = (info.conv_template if info else None) or template_for(None, body.model)
        rendered = render_chat(body.messages, template)
        images = [await self._load_image(address) for address in rendered.images]
        limit = info.max_new_tokens if info else 1024
        content = json.dumps(
            {
                "model": body.model,
                "prompt": rendered.prompt,
                "text_spans": rendered.prompt.text_spans,
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
        completion = ChatCompletion(body, rendered, upstream, request_id)
        close = self.controller.close_callback(upstream, completion.outcome)
        if body.stream:
            return StreamResponse(completion.events(), close, media_type="text/event-stream")
        return DeferredResponse(completion.response(), close)

    async def _load_image(self, address: str) -> str:
        """Base64 of the image in a data URI or, where allowed, at an https address."""
        scheme, _, rest = address.partition(":")
        if scheme == "data":
            kind, comma, data = rest.partition(",")
            if not comma or not kind.startswith("image/") or not kind.endswith(";base64"):
                raise _bad_image("The data URI of an image must have the form data:image/png;base64,…")
            return data
        if scheme not in ("http", "https"):
            raise _bad_image("An image must be a data URI; paths and other addresses are not supported.")
        if not self.allow_urls:
            raise _bad_image("Image URLs are disabled; send the image as a data URI.")
        async with self._fetching:
            try:
                content = await asyncio.to_thread(download, address, _IMAGE_BYTES, unsafe_local=self.unsafe_local)
            except ImageError as error:
                raise _bad_image("Cannot fetch the image; only https addresses of public hosts are allowed.") from error
        return base64.b64encode(content).decode()


def _bad_image(message: str) -> ServeError:
    return ServeError(ErrorType.BAD_IMAGE, message, param="messages")


def _unknown_model() -> ServeError:
    return ServeError(ErrorType.NOT_FOUND, "No worker serves this model; see /v1/models.", param="model")


class ChatCompletion:
    """One chat completion, as an object or as server-sent events. `outcome[0]` is its label in the metrics."""

    def __init__(self, body: ChatBody, rendered: RenderedChat, upstream: WorkerStream, request_id: str) -> None:
        self.model = body.model
        self.include_usage = body.stream_options.include_usage
        self.prompt = rendered.prompt
        self.upstream = upstream
        self.request_id = request_id
        self.created = int(time.time())
        self.finish_reason: str | None = None
        self.usage: dict[str, object] | None = None  # absent from old workers
        self.outcome = ["cancelled"]
        self._shown = ""

    async def _texts(self) -> AsyncGenerator[str, None]:
        """New text of each frame. Cumulative frames of old workers are recognized by the prompt at their start."""
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
                    with _malformed_frames():
                        self._finish(frame)
        self.finish_reason = self.finish_reason or "stop"
        self.outcome[0] = self.finish_reason

    def _parse(self, raw: bytes) -> Frame:
        with _malformed_frames():
            frame: Frame = json.loads(raw)
            code, error = int(frame["error_code"]), dict(frame.get("error") or {})
        if code:
            raise ServeError(ErrorType.from_wire(error.get("type")), str(error.get("message") or frame.get("text", "")))
        return frame

    def _finish(self, frame: Frame) -> None:
        reason = frame["finish_reason"]
        self.finish_reason = "length" if reason in ("length", "context_exceeded") else "stop"
        counts = {key: int(value) for key, value in (frame.get("usage") or {}).items()}
        if not counts:
            return
        prompt, completion = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
        self.usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if "image_tokens" in counts:
            self.usage["prompt_tokens_details"] = {"image_tokens": counts["image_tokens"]}

    async def response(self) -> Response:
        """The completion as one object; raises `ServeError`."""
        try:
            text = "".join([text async for text in self._texts()])
        except ServeError as error:
            self.outcome[0] = error.kind.wire
            raise
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], "usage": self.usage})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The completion as server-sent events, terminated by `[DONE]` also after an error."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async with aclosing(self._texts()) as texts:
                async for text in texts:
                    yield self._chunk({"content": text})
            yield self._chunk({}, self.finish_reason)
            if self.include_usage:
                yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage})
        except ServeError as error:
            self.outcome[0] = error.kind.wire
            yield _event({"error": openai_error(error, self.request_id)})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": f"chatcmpl-{self.request_id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice]})


@contextmanager
def _malformed_frames() -> Iterator[None]:
    """Convert exceptions caused by a malformed frame to `ServeError`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker sent a malformed frame.") from error


def _event(content: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def add_api_routes(app: FastAPI, server: OpenAIServing) -> None:
    """Add the API to the controller application."""

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        for entry in server.models():
            if entry["id"] == name:
                return entry
        raise _unknown_model()

    @app.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await server.complete(body, request)
