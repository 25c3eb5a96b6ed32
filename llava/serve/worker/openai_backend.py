"""A `Backend` that passes requests on to an OpenAI-compatible server and its stream back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

import httpx

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.detokenizer import TextStream
from llava.serve.common.openai_prompt import parse
from llava.serve.common.protocol import ErrorType, FinishReason, GenerateBody, Message, ModelInfo, ServeError, State
from llava.serve.common.security import authorization
from llava.serve.control.worker_client import read_start
from llava.serve.worker.backend import Answer, Piece

logger = logging.getLogger(__name__)

_KEEP_ALIVE: Final = 2.0
_PROBE_SECONDS: Final = 5.0
_MAGIC: Final = (("iVBOR", "png"), ("/9j/", "jpeg"), ("UklGR", "webp"))


class OpenAIBackend:
    """`upstream` ends in `/v1`. Ready while it lists its models; asked again every five seconds."""

    features: Final = ["delta", "messages"]
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
        self._watching: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        return self.in_use

    async def start(self, on_change: Callable[[], None]) -> None:
        self._watching = asyncio.ensure_future(self._watch(on_change))

    async def _watch(self, on_change: Callable[[], None]) -> None:
        while True:
            before, self.state = self.state, await self._probe()
            if self.state != before:
                logger.info("The engine behind this worker is %s.", "ready" if self.state == "ready" else "not ready")
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
        if self._watching is not None:
            self._watching.cancel()
        await self._http.aclose()

    async def open(self, body: GenerateBody) -> Answer:
        if self.state != "ready":
            raise ServeError(ErrorType.NOT_READY, "The engine behind this worker is not ready.", retry_after=5)
        if self.in_use >= self.capacity:
            raise ServeError(ErrorType.OVERLOADED, "All places are taken; try again shortly.", retry_after=2)
        messages = _with_images(body.messages or parse(body.prompt, self._template), body.images, self._max_images)
        request = self._http.build_request("POST", "/chat/completions", json=self._request(body, messages))
        self.in_use += 1
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code != 200:
                raise await _refusal(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.in_use -= 1
            raise _broken(error) from error
        except BaseException:
            self.in_use -= 1
            raise
        return Answer(_stopped_at(_stops(body), _pieces(response)), self._closer(response))

    def _request(self, body: GenerateBody, messages: list[dict[str, Any]]) -> dict[str, Any]:
        limit = self.info.max_new_tokens if self.info else body.max_new_tokens
        request: dict[str, Any] = {
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
        stops = _stops(body)[:4]  # OpenAI's servers take no more
        return {**request, "stop": stops} if stops else request

    def _closer(self, response: httpx.Response) -> Callable[[], None]:
        closed = False

        def close() -> None:
            nonlocal closed
            if not closed:
                closed = True
                self.in_use -= 1
                task = asyncio.ensure_future(response.aclose())
                task.add_done_callback(lambda done: done.cancelled() or done.exception())

        return close


def _stops(body: GenerateBody) -> list[str]:
    """What ends the answer, save a template's own end token, which is the engine's business."""
    return [text for text in body.stop if not (text.startswith("<") and text.endswith(">"))]


def _with_images(messages: list[Message], images: list[str], max_images: int) -> list[dict[str, Any]]:
    """Messages with each placeholder replaced by the next picture; `ServeError` (400) when the numbers differ."""
    tags = sum(message.content.count(DEFAULT_IMAGE_TOKEN) for message in messages)
    if tags != len(images):
        raise ServeError(
            ErrorType.IMAGE_COUNT_MISMATCH,
            f"The prompt has {tags} {DEFAULT_IMAGE_TOKEN} placeholder(s) but {len(images)} image(s) came with it.",
            placeholders=tags,
            images=len(images),
        )
    if len(images) > max_images:
        raise ServeError(ErrorType.BAD_REQUEST, f"{len(images)} images were sent; this model takes {max_images}.")
    waiting = iter(images)
    return [_as_parts(message, waiting) for message in messages]


def _as_parts(message: Message, images: Any) -> dict[str, Any]:
    texts = message.content.split(DEFAULT_IMAGE_TOKEN)
    if len(texts) == 1:
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        if index:
            data = "".join(next(images).split())
            kind = next((kind for start, kind in _MAGIC if data.startswith(start)), None)
            if kind is None:
                raise ServeError(ErrorType.BAD_IMAGE, "An image is not base64 of a JPEG, PNG or WebP file.")
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return {"role": message.role, "content": parts}


async def _pieces(response: httpx.Response) -> AsyncGenerator[Piece, None]:
    """Server-sent events to pieces, with an empty one every two seconds of silence."""
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
                yield Piece()
                continue
            if isinstance(line, Exception):
                raise _broken(line) from line
            if line is None or line == "data: [DONE]":
                break
            if not line.startswith("data:"):
                continue
            text, reason, usage = _read_event(line[5:], reason, usage)
            if text:
                yield Piece(text)
    finally:
        reader.cancel()
    if reason is None:
        raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The engine behind this worker broke off.")
    yield Piece("", reason, usage)


async def _stopped_at(stops: list[str], pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """`pieces` up to the first stop string, for engines that take `stop` and do not heed it."""
    text = TextStream(stops)
    async with aclosing(pieces):
        async for piece in pieces:
            if not stops:
                yield piece
                continue
            shown = text.push(piece.text, final=piece.finish_reason is not None)
            if text.stopped:
                yield Piece(shown, "stop", piece.usage)
                return
            if shown or not piece.text:
                yield replace(piece, text=shown)


def _read_event(
    data: str, reason: FinishReason | None, usage: dict[str, int]
) -> tuple[str, FinishReason | None, dict[str, int]]:
    try:
        event = json.loads(data)
        if event.get("error"):
            raise ServeError(ErrorType.INTERNAL, "The engine behind this worker failed on this request.")
        counts = event.get("usage") or {}
        usage = {key: int(counts[key]) for key in ("prompt_tokens", "completion_tokens") if key in counts} or usage
        text = ""
        for choice in event.get("choices") or []:
            text += choice.get("delta", {}).get("content") or ""
            if choice.get("finish_reason"):
                reason = "length" if choice["finish_reason"] == "length" else "stop"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The engine behind this worker sent no valid event.") from error
    return text, reason, usage


async def _refusal(response: httpx.Response) -> ServeError:
    """What the engine said, as far as it is the client's business."""
    body = await read_start(response)
    await response.aclose()
    if response.status_code in (429, 503):
        return ServeError(ErrorType.OVERLOADED, "The engine behind this worker is busy.", retry_after=2)
    if response.status_code in (400, 413, 422):
        if b"context" in body and b"length" in body:
            return ServeError(ErrorType.CONTEXT_TOO_LONG, "The conversation is longer than the engine's context.")
        return ServeError(ErrorType.BAD_REQUEST, "The engine behind this worker refuses the request.")
    logger.warning("The engine behind this worker answered with status %d.", response.status_code)
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The engine behind this worker cannot answer.")


def _broken(error: Exception) -> ServeError:
    if isinstance(error, httpx.TimeoutException):
        return ServeError(ErrorType.TIMEOUT, "The engine behind this worker has stopped answering.")
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The engine behind this worker cannot be reached.")
