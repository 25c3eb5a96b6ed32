"""Backend that forwards requests to an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Final, cast

import httpx

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.detokenizer import TextStream
from llava.images import SERVED, image_data_url
from llava.openai_protocol import ApiError, Dialect, ReplyReader, read_error, read_events
from llava.serve.common.openai_chat import parse_prompt
from llava.serve.common.protocol import ErrorType, GenerateBody, Message, ModelInfo, ServeError, State, TokenLogprob
from llava.serve.common.security import authorization
from llava.serve.common.streaming import with_keep_alive
from llava.serve.control.worker_client import read_start
from llava.serve.worker.backend import Delta, Generation, check_image_count

logger = logging.getLogger(__name__)

_KEEP_ALIVE: Final = 2.0
_PROBE_SECONDS: Final = 5.0

JsonObject = dict[str, object]


class OpenAIBackend:
    """The `Backend` over the API at `upstream`, which ends in `/v1`; ready while `/models` lists the model."""

    features: Final = ["delta", "messages", "sampling", "text_spans"]
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
        self._key = key
        self._dialect = Dialect()
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

    def statistics(self) -> None:
        """None: the engine is another process, which has its own metrics."""

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
        if body.prompt_token_ids:
            raise ServeError(ErrorType.BAD_REQUEST, "The engine behind this worker accepts no token ids; send text.")
        if self.state != "ready":
            raise ServeError(ErrorType.NOT_READY, "The upstream engine is not ready.", retry_after=5)
        if self.in_use >= self.capacity:
            raise ServeError(ErrorType.OVERLOADED, "All slots are in use; try again shortly.", retry_after=2)
        self.in_use += 1
        sending = asyncio.ensure_future(self._send(body))
        close = self._close_callback(sending)
        try:  # an engine that sends no headers before its first token is not waited for
            await asyncio.wait({sending}, timeout=_KEEP_ALIVE)
            if sending.done():
                sending.result()
        except BaseException:
            close()
            raise
        deltas = _stop_at(_stop_strings(body), self._deltas(sending, body), body.n)
        return Generation(with_keep_alive(deltas, _KEEP_ALIVE, Delta()), close)

    def tokenize(self, body: object) -> dict[str, object]:
        """Refuse; the OpenAI API has no tokenizer."""
        raise ServeError(ErrorType.BAD_REQUEST, "The engine behind this worker has no tokenizer.")

    detokenize = tokenize

    async def _send(self, body: GenerateBody) -> httpx.Response:
        """The response to a request, which is repeated without the optional parameters that the engine refuses."""
        turns = body.messages or parse_prompt(body.rendered_prompt, self._template)
        request = self._request(body, await asyncio.to_thread(_with_images, turns, body.images, self._max_images))
        try:
            while True:
                sent = self._dialect.translate(request)
                post = self._http.build_request("POST", "/chat/completions", json=sent)
                response = await self._http.send(post, stream=True)
                if response.is_success:
                    return response
                error = read_error(await read_start(response), response.status_code, response.headers)
                await response.aclose()
                self._dialect.learn(error, sent)
                if self._dialect.translate(request) == sent:
                    raise self._serve_error(error, refused=True) from error
                logger.info("The upstream engine refused a parameter: %s", error.message)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _connection_error(error) from error

    async def _deltas(self, sending: asyncio.Future[httpx.Response], body: GenerateBody) -> AsyncGenerator[Delta, None]:
        """Deltas of a response, which is a stream of server-sent events or a whole reply."""
        response, readers = await sending, [ReplyReader(index) for index in range(body.n)]
        try:
            chunks = cast(AsyncGenerator[bytes, None], response.aiter_bytes())
            async with aclosing(read_events(chunks)) as events:
                async for event in events:
                    for reader in readers:
                        text = reader.push(event)
                        logprobs = cast(list[TokenLogprob], reader.take_logprobs())
                        if text or logprobs:
                            yield Delta(text, index=reader.index, logprobs=logprobs)
            replies = [reader.finish() for reader in readers]
        except ApiError as error:
            raise self._serve_error(error) from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _connection_error(error) from error
        for reader, reply in zip(readers, replies, strict=True):
            failure = reply.failure
            if body.n > 1 and not reader.is_started:
                failure = f"it has no choice {reader.index}, though {body.n} were requested"
            elif body.num_logprobs is not None and reply.text and not reader.has_logprobs:
                failure = "it has no log probabilities, though they were requested"
            if failure:
                kind = ErrorType.BAD_REQUEST if reply.finish_reason == "content_filter" else ErrorType.INTERNAL
                raise ServeError(kind, f"The upstream engine returned an incomplete answer: {failure}.")
        for reader, reply in zip(readers, replies, strict=True):
            text = "" if reply.text else reply.refusal
            usage = {} if reader.index else reply.usage  # counts all choices
            yield Delta(text, "length" if reply.finish_reason == "length" else "stop", usage, index=reader.index)

    def _serve_error(self, error: ApiError, *, refused: bool = False) -> ServeError:
        """The error for clients and the log line of a refusal, or of a failure within a reply."""
        reason, status = error.message.replace(self._key or "\0", "***"), error.status
        logger.warning("The upstream engine failed (status %d): %s", status, reason)
        if not error.is_structured and not 400 <= status < 500:
            reason = ""  # the text of a proxy, or a traceback
        if error.is_context_overflow:
            kind, text = ErrorType.CONTEXT_TOO_LONG, "The conversation exceeds the engine's context length"
        elif status in (401, 403):
            kind, text, reason = ErrorType.WORKER_UNAVAILABLE, "The upstream engine rejects this worker's key", ""
        elif status in (408, 409, 429, 503, 529):
            kind, text = ErrorType.OVERLOADED, "The upstream engine is busy"
        elif status in (400, 413, 422):
            image = "image" in error.code
            kind, text = (
                ErrorType.BAD_IMAGE if image else ErrorType.BAD_REQUEST,
                "The upstream engine refused the request",
            )
        elif refused:
            kind, text = ErrorType.WORKER_UNAVAILABLE, f"The upstream engine returned status {status}"
        elif error.is_structured:
            kind, text = ErrorType.INTERNAL, "The upstream engine failed on this request"
        else:
            kind, text = ErrorType.WORKER_UNAVAILABLE, f"The upstream engine failed: {error.message.partition(':')[0]}"
        wait = (error.retry_after or 2) if kind is ErrorType.OVERLOADED else None
        return ServeError(kind, f"{text}: {reason}" if reason else f"{text}.", retry_after=wait)

    def _request(self, body: GenerateBody, messages: list[JsonObject]) -> JsonObject:
        limit = self.info.max_new_tokens if self.info else body.max_new_tokens
        request: JsonObject = {
            "model": self.model,
            "messages": messages,
            "max_tokens": min(body.max_new_tokens, limit),
            "stream": True,
            "stream_options": {"include_usage": True},
            **_sampling(body),
        }
        stops = _stop_strings(body)[:4]  # the limit of the OpenAI API
        return {**request, "stop": stops} if stops else request

    def _close_callback(self, sending: asyncio.Future[httpx.Response]) -> Callable[[], None]:
        closed = False

        async def release() -> None:
            sending.cancel()
            await (await sending).aclose()

        def close() -> None:
            nonlocal closed
            if not closed:
                closed = True
                self.in_use -= 1
                task = asyncio.ensure_future(release())
                task.add_done_callback(lambda done: done.cancelled() or done.exception())

        return close


def _stop_strings(body: GenerateBody) -> list[str]:
    """The stop strings without special tokens, which the engine handles."""
    return [text for text in body.stop if not (text.startswith("<") and text.endswith(">"))]


def _sampling(body: GenerateBody) -> JsonObject:
    """The sampling fields by the names of OpenAI and vLLM; a JSON schema is sent as OpenAI's `response_format`.

    vLLM reads `structured_outputs`, and versions before 0.12 `guided_regex` and `guided_choice`; both ignore the other.
    """
    fields = {name: value for name, value in body.worker_fields().items() if value is not None}
    if (count := fields.pop("top_logprobs", None)) is not None:
        fields |= {"logprobs": True, "top_logprobs": count}
    schema, given = body.schema_of_answer, body.response_format.json_schema
    if schema is not None and body.response_format.type != "json_object":
        fields.pop("guided_json", None)
        strict = {} if given is None or given.strict is None else {"strict": given.strict}
        named = {"name": given.name if given else "answer", "schema": schema, **strict}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    for name in ("regex", "choice"):
        if f"guided_{name}" in fields:
            fields["structured_outputs"] = {name: fields[f"guided_{name}"]}
    return fields


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


async def _stop_at(stops: list[str], deltas: AsyncGenerator[Delta, None], choices: int) -> AsyncGenerator[Delta, None]:
    """`deltas` of every choice, cut at its first stop string, for engines that ignore `stop`."""
    streams = [TextStream(stops) for _ in range(choices)]
    stopped: set[int] = set()
    async with aclosing(deltas):
        async for delta in deltas:
            if not stops:
                yield delta
            if not stops or delta.index in stopped:
                continue
            stream = streams[delta.index]
            text = stream.push(delta.text, final=delta.finish_reason is not None)
            if stream.stopped:
                yield replace(delta, text=text, finish_reason="stop")
                stopped.add(delta.index)
                if len(stopped) == choices:
                    return
            elif text or delta.logprobs or not delta.text:
                yield replace(delta, text=text)


def _connection_error(error: Exception) -> ServeError:
    if isinstance(error, httpx.TimeoutException):
        return ServeError(ErrorType.TIMEOUT, "The upstream engine stopped responding.")
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The upstream engine cannot be reached.")
