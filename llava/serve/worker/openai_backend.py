"""Backend that forwards requests to an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Final

import httpx

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.detokenizer import TextStream
from llava.images import SERVED, image_data_url
from llava.serve.common.openai_chat import parse_prompt
from llava.serve.common.protocol import ErrorType, FinishReason, GenerateBody, Message, ModelInfo, ServeError, State
from llava.serve.common.security import authorization
from llava.serve.control.worker_client import read_start
from llava.serve.worker.backend import Delta, Generation, check_image_count

logger = logging.getLogger(__name__)

_KEEP_ALIVE: Final = 2.0
_PROBE_SECONDS: Final = 5.0

JsonObject = dict[str, object]


class OpenAIBackend:
    """The `Backend` over the API at `upstream`, which ends in `/v1`; ready while `/models` lists the model."""

    features: Final = ["delta", "messages", "text_spans"]
    progress: Final = None

    def __init__(
        self, upstream: str, model: str | None, key: str | None, info: ModelInfo, *, capacity: int, idle: float = 120.0
    ) -> None:
        self.info: ModelInfo | None = info
        self.model = model
        self.in_use = 0
        self.capacity = capacity
        self.state: State = "loading"
        self._max_images = info.max_images
        self._template = info.conv_template or "vicuna_v1"
        self._http = httpx.AsyncClient(
            base_url=upstream,
            headers=authorization(key),
            timeout=httpx.Timeout(idle, connect=_PROBE_SECONDS),
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )
        self._monitor_task: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        return self.in_use

    async def start(self, on_change: Callable[[], None]) -> None:
        self._monitor_task = asyncio.ensure_future(self._monitor(on_change))

    async def _monitor(self, on_change: Callable[[], None]) -> None:
        while True:
            before, self.state = self.state, await self._probe()
            if self.state != before:
                logger.info("The upstream engine is %s.", "ready" if self.state == "ready" else "not ready")
                on_change()
            await asyncio.sleep(_PROBE_SECONDS)

    async def _probe(self) -> State:
        try:
            reply = await self._http.get("/models", timeout=_PROBE_SECONDS)
            names = [str(entry["id"]) for entry in reply.raise_for_status().json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
            return "loading"
        self.model = self.model or next(iter(names), None)
        return "ready" if self.model in names else "loading"

    async def stop(self) -> None:
        if self._monitor_task is not None:
            self._monitor_task.cancel()
        await self._http.aclose()

    async def open(self, body: GenerateBody) -> Generation:
        if self.state != "ready":
            raise ServeError(ErrorType.NOT_READY, "The upstream engine is not ready.", retry_after=5)
        if self.in_use >= self.capacity:
            raise ServeError(ErrorType.OVERLOADED, "All slots are in use; try again shortly.", retry_after=2)
        self.in_use += 1
        try:
            turns = body.messages or parse_prompt(body.rendered_prompt, self._template)
            messages = await asyncio.to_thread(_with_images, turns, body.images, self._max_images)
            request = self._http.build_request("POST", "/chat/completions", json=self._request(body, messages))
            response = await self._http.send(request, stream=True)
            if response.status_code != 200:
                raise await _refusal(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.in_use -= 1
            raise _connection_error(error) from error
        except BaseException:
            self.in_use -= 1
            raise
        return Generation(_stop_at(_stop_strings(body), _deltas(response)), self._close_callback(response))

    def _request(self, body: GenerateBody, messages: list[JsonObject]) -> JsonObject:
        limit = self.info.max_new_tokens if self.info else body.max_new_tokens
        request: JsonObject = {
            "model": self.model,
            "messages": messages,
            "max_tokens": min(body.max_new_tokens, limit),
            "temperature": body.temperature,
            "top_p": body.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if body.seed is not None:
            request["seed"] = body.seed
        stops = _stop_strings(body)[:4]  # the limit of the OpenAI API
        return {**request, "stop": stops} if stops else request

    def _close_callback(self, response: httpx.Response) -> Callable[[], None]:
        closed = False

        def close() -> None:
            nonlocal closed
            if not closed:
                closed = True
                self.in_use -= 1
                task = asyncio.ensure_future(response.aclose())
                task.add_done_callback(lambda done: done.cancelled() or done.exception())

        return close


def _stop_strings(body: GenerateBody) -> list[str]:
    """The stop strings without special tokens, which the engine handles."""
    return [text for text in body.stop if not (text.startswith("<") and text.endswith(">"))]


def _with_images(messages: list[Message], images: list[str], max_images: int) -> list[JsonObject]:
    """Messages with each placeholder replaced by the next image; `ServeError` (400) when the numbers differ."""
    placeholders = sum(message.content.count(DEFAULT_IMAGE_TOKEN) for message in messages if message.role == "user")
    check_image_count(placeholders, len(images), max_images)
    remaining = iter(images)
    return [_as_parts(message, remaining) for message in messages]


def _as_parts(message: Message, images: Iterator[str]) -> JsonObject:
    texts = message.content.split(DEFAULT_IMAGE_TOKEN) if message.role == "user" else [message.content]
    if len(texts) == 1:
        return {"role": message.role, "content": message.content}
    parts: list[JsonObject] = []
    for index, text in enumerate(texts):
        if index:
            try:
                url = image_data_url(base64.b64decode("".join(next(images).split()), validate=True), limits=SERVED)
            except ValueError as error:  # also `ImageError`
                refusal = "An image is not a base64-encoded GIF, JPEG, PNG or WebP file."
                raise ServeError(ErrorType.BAD_IMAGE, refusal) from error
            parts.append({"type": "image_url", "image_url": {"url": url}})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return {"role": message.role, "content": parts}


async def _deltas(response: httpx.Response) -> AsyncGenerator[Delta, None]:
    """Deltas of a stream of server-sent events, an empty one after two seconds of silence."""
    lines: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for line in response.aiter_lines():
                lines.put_nowait(line)
            lines.put_nowait(None)
        except (httpx.HTTPError, httpx.StreamError) as error:
            lines.put_nowait(error)

    reader = asyncio.ensure_future(read())
    reason: FinishReason | None = None
    usage: dict[str, int] = {}
    try:
        while True:
            try:
                line = await asyncio.wait_for(lines.get(), _KEEP_ALIVE)
            except asyncio.TimeoutError:
                yield Delta()
                continue
            if isinstance(line, Exception):
                raise _connection_error(line) from line
            if line is None or line == "data: [DONE]":
                break
            if not line.startswith("data:"):
                continue
            text, reason, usage = _read_event(line[5:], reason, usage)
            if text:
                yield Delta(text)
    finally:
        reader.cancel()
    if reason is None:
        raise ServeError(
            ErrorType.WORKER_UNAVAILABLE, "The upstream engine closed the connection before the answer was complete."
        )
    yield Delta("", reason, usage)


async def _stop_at(stops: list[str], deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """`deltas` up to the first stop string, for engines that ignore `stop`."""
    stream = TextStream(stops)
    async with aclosing(deltas):
        async for delta in deltas:
            if not stops:
                yield delta
                continue
            text = stream.push(delta.text, final=delta.finish_reason is not None)
            if stream.stopped:
                yield Delta(text, "stop", delta.usage)
                return
            if text or not delta.text:
                yield replace(delta, text=text)


def _read_event(
    data: str, reason: FinishReason | None, usage: dict[str, int]
) -> tuple[str, FinishReason | None, dict[str, int]]:
    try:
        event = json.loads(data)
        if event.get("error"):
            raise ServeError(ErrorType.INTERNAL, "The upstream engine failed on this request.")
        counts = event.get("usage") or {}
        usage = {key: int(counts[key]) for key in ("prompt_tokens", "completion_tokens") if key in counts} or usage
        text = ""
        for choice in event.get("choices") or []:
            text += choice.get("delta", {}).get("content") or ""
            if choice.get("finish_reason"):
                reason = "length" if choice["finish_reason"] == "length" else "stop"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The upstream engine sent a malformed event.") from error
    return text, reason, usage


async def _refusal(response: httpx.Response) -> ServeError:
    """The error of an engine that refused the request, without the engine's own text."""
    body = await read_start(response)
    await response.aclose()
    if response.status_code in (429, 503):
        return ServeError(ErrorType.OVERLOADED, "The upstream engine is busy.", retry_after=2)
    if response.status_code in (400, 413, 422):
        if b"context" in body and b"length" in body:
            return ServeError(ErrorType.CONTEXT_TOO_LONG, "The conversation exceeds the engine's context length.")
        return ServeError(ErrorType.BAD_REQUEST, "The upstream engine refused the request.")
    logger.warning("The upstream engine returned status %d.", response.status_code)
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The upstream engine failed.")


def _connection_error(error: Exception) -> ServeError:
    if isinstance(error, httpx.TimeoutException):
        return ServeError(ErrorType.TIMEOUT, "The upstream engine stopped responding.")
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The upstream engine cannot be reached.")
