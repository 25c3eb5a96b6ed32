"""Answers of workers as choices of a reply in the format of a route: one object, or server-sent events."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from fastapi.responses import JSONResponse
from starlette.responses import Response

from llava.serve.common.middleware import openai_error
from llava.serve.common.protocol import ErrorType, Frame, ServeError, TokenLogprob
from llava.serve.common.streaming import merged, with_keep_alive
from llava.serve.control.worker_client import WorkerStream

Json = dict[str, object]


@dataclass(eq=False)
class Choice:
    """One answer: its text so far, and log probabilities if the request wants them."""

    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Piece(NamedTuple):
    """New text and tokens of a choice; the last one has the finish reason."""

    choice: Choice
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None


class Answer:
    """The choices that a worker streams for one prompt. `outcome[0]` is the request's label in the metrics.

    `prompt` is stripped from the cumulative frames of old workers, which begin with it; empty for other workers.
    """

    def __init__(self, prompt: str, upstream: WorkerStream, n: int = 1, first_index: int = 0) -> None:
        self.choices = [Choice(first_index + k) for k in range(n)]
        self.counts: dict[str, int] = {}  # token counts; old workers send none
        self.outcome = ["cancelled"]
        self._upstream = upstream
        self._prompt = prompt
        self._shown = ""

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """A piece for every frame that has text, tokens or a finish reason. Raises `ServeError`."""
        try:
            async with aclosing(self._upstream.frames()) as frames:
                async for raw in frames:
                    with malformed_replies():
                        piece = self._read(json.loads(raw))
                    if piece.text or piece.logprobs or piece.finish_reason:
                        yield piece
            unfinished = [choice for choice in self.choices if choice.finish_reason is None]
            if unfinished and len(self.choices) > 1:
                text = "The worker closed the connection before the answer was complete."
                raise ServeError(ErrorType.WORKER_UNAVAILABLE, text)
            for choice in unfinished:
                choice.finish_reason = "stop"  # workers of other LLaVA versions send no reason
                yield Piece(choice, "", [], "stop")
        except ServeError as error:
            self.outcome[0] = error.kind.wire
            raise
        self.outcome[0] = str(self.choices[-1].finish_reason)

    def _read(self, frame: Frame) -> Piece:
        error = dict(frame.get("error") or {})
        if int(frame["error_code"]):
            message = str(error.get("message") or frame.get("text", ""))
            raise ServeError(ErrorType.from_wire(error.get("type")), message)
        choice = self.choices[int(frame.get("index", 0))]
        text = self._new_text(str(frame.get("text", "")))
        logprobs = [_logprob(each) for each in frame.get("logprobs") or ()]
        choice.texts.append(text)
        choice.logprobs += logprobs
        reason = None
        if frame.get("finish_reason"):
            reason = "length" if frame["finish_reason"] in ("length", "context_exceeded") else "stop"
            choice.finish_reason = reason
            for key, value in (frame.get("usage") or {}).items():
                self.counts[key] = self.counts.get(key, 0) + int(value)  # only the first choice counts the prompt
        return Piece(choice, text, logprobs, reason)

    def _new_text(self, text: str) -> str:
        """The new text of a frame."""
        if self._shown or (self._prompt and text.startswith(self._prompt)):
            answer = text.removeprefix(self._prompt).lstrip()
            text, self._shown = answer[len(self._shown) :], answer or self._shown
        return text


def _logprob(value: TokenLogprob) -> TokenLogprob:
    """A valid entry of `logprobs`, with -9999 for a probability of 0 as in the OpenAI API; raises otherwise."""
    logprob = float(value["logprob"])
    if logprob != logprob:
        raise ValueError("a log probability is not a number")
    entry: TokenLogprob = {"token": str(value["token"]), "logprob": min(max(logprob, -9999.0), 0.0)}
    entry["bytes"] = [int(byte) for byte in value.get("bytes") or ()]
    if "top_logprobs" in value:
        entry["top_logprobs"] = [_logprob(each) for each in value["top_logprobs"]]
    return entry


@contextmanager
def malformed_replies() -> Iterator[None]:
    """Convert exceptions from a malformed frame or reply of a worker to `ServeError`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker sent a malformed frame.") from error


class Reply(ABC):
    """The reply of a route to one request: the choices of `answers` as OpenAI objects.

    It holds no images of the request, since it lives as long as the answer.
    """

    path: ClassVar[str]
    prefix: ClassVar[str]  # of ids
    end: ClassVar[bytes] = b"data: [DONE]\n\n"  # of streams

    def __init__(self, model: str, request_id: str, answers: Sequence[Answer]) -> None:
        self.model = model
        self.request_id = request_id
        self.answers = answers
        self.choices = [choice for answer in answers for choice in answer.choices]
        self.id = self.prefix + request_id
        self.created = int(time.time())

    @abstractmethod
    def whole(self) -> Json:
        """The reply as one object, after the last piece."""

    @abstractmethod
    def opening(self) -> Iterator[Json]:
        """Events before the first piece."""

    @abstractmethod
    def piece(self, piece: Piece) -> Iterator[Json]:
        """Events of a piece."""

    @abstractmethod
    def closing(self) -> Iterator[Json]:
        """Events after the last piece."""

    def failure(self, error: Json) -> Iterator[Json]:
        """Events that report an error within the stream."""
        yield {"error": error}

    def encode(self, event: Json) -> bytes:
        """An event as a server-sent event."""
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def _pieces(self) -> AsyncGenerator[Piece, None]:
        if len(self.answers) == 1:
            return self.answers[0].pieces()
        return merged([answer.pieces() for answer in self.answers])

    async def response(self) -> Response:
        """The reply as one object; raises `ServeError`."""
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        return JSONResponse(self.whole())

    async def events(self, keep_alive: float) -> AsyncGenerator[bytes, None]:
        """The reply as server-sent events, also of an error; a comment after `keep_alive` seconds of silence."""
        for event in self.opening():
            yield self.encode(event)
        try:
            pieces: AsyncGenerator[Piece | None, None] = with_keep_alive(self._pieces(), keep_alive, None)
            async with aclosing(pieces):
                async for piece in pieces:
                    if piece is None:
                        yield b": keep-alive\n\n"
                    else:
                        for event in self.piece(piece):
                            yield self.encode(event)
            for event in self.closing():
                yield self.encode(event)
        except ServeError as error:
            for event in self.failure(openai_error(error, self.request_id, self.path)):
                yield self.encode(event)
        yield self.end

    @property
    def usage(self) -> Json | None:
        """Token counts; None when a worker sends none."""
        counts = [answer.counts for answer in self.answers]
        if not all(counts):
            return None
        prompt, completion, images = (
            sum(each.get(f"{kind}_tokens", 0) for each in counts) for kind in ("prompt", "completion", "image")
        )
        usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if any("image_tokens" in each for each in counts):
            usage["prompt_tokens_details"] = {"image_tokens": images}
        return usage


class Shown(NamedTuple):
    """Fields of a reply with choices besides their text."""

    stream_usage: bool
    logprobs: bool


class ChoicesReply(Reply):
    """Reply with a list of choices, of chat and of text completions. A chunk of a stream holds one choice."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, request_id: str, answers: Sequence[Answer], *, shown: Shown) -> None:
        super().__init__(model, request_id, answers)
        self.shown = shown

    @abstractmethod
    def content(self, choice: Choice) -> Json:
        """The keys of a choice that hold its text."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """The keys of a choice in a chunk that hold new text."""

    def logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> object:
        """The log probabilities of tokens that follow those before them in the choice."""
        return {"content": entries, "refusal": None}

    def whole(self) -> Json:
        choices = [self._choice(c, self.content(c), c.finish_reason, c.logprobs) for c in self.choices]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage}

    def piece(self, piece: Piece) -> Iterator[Json]:
        if piece.text or piece.logprobs:
            yield self.chunk(piece.choice, self.delta(piece.text), logprobs=piece.logprobs)
        if piece.finish_reason:
            yield self.chunk(piece.choice, self.delta(""), piece.finish_reason)
        piece.choice.texts.clear()  # what is sent is not kept for the length of the answer
        piece.choice.logprobs.clear()

    def closing(self) -> Iterator[Json]:
        if self.shown.stream_usage:
            yield {**self._head(self.chunk_kind), "choices": [], "usage": self.usage}

    def chunk(
        self,
        choice: Choice,
        content: Json,
        finish_reason: str | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> Json:
        return {**self._head(self.chunk_kind), "choices": [self._choice(choice, content, finish_reason, logprobs)]}

    def _choice(
        self, choice: Choice, content: Json, finish_reason: str | None, logprobs: list[TokenLogprob] | None
    ) -> Json:
        shown = self.logprobs(choice, logprobs) if self.shown.logprobs and logprobs is not None else None
        return {"index": choice.index, **content, "finish_reason": finish_reason, "logprobs": shown}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatReply(ChoicesReply):
    """Reply of `/v1/chat/completions`."""

    path = "/v1/chat/completions"
    prefix = "chatcmpl-"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self) -> Iterator[Json]:
        for choice in self.choices:
            yield self.chunk(choice, {"delta": {"role": "assistant", "content": ""}})

    def content(self, choice: Choice) -> Json:
        return {"message": {"role": "assistant", "content": choice.text}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}
