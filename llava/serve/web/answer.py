"""Answering a turn: finds a worker, renders the conversation under its template, follows its stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, Final

from llava.conversation import get_template, stop_strings, template_for
from llava.errors import LlavaError, TemplateError
from llava.serve.common.protocol import ErrorType, ServeError, WorkerStatus
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.client import ServiceClient
from llava.serve.web.errors import explain

logger = logging.getLogger(__name__)
REDRAW: Final = 0.1  # seconds between two pictures of a growing answer
_PULSE: Final = 0.5
_LENGTH: Final = "The answer stops here because it reached the limit of output tokens."
_STOPPED: Final = "Stopped."


async def answer(client: ServiceClient, chat: Chat) -> AsyncGenerator[None, None]:
    """Fill in the last turn of `chat`, yielding whenever there is something new to show, and at the end.

    Ends early, and stops the worker, when `chat.stop` is set or the generator is closed. A failure becomes the turn's
    note; what was answered before it stays.
    """
    turn = chat.turns[-1]
    chat.stop.clear()
    try:
        async with aclosing(_pieces(client, chat, turn)) as pieces:
            drawn = 0.0
            async with aclosing(_until(chat.stop, pieces)) as steps:
                async for _ in steps:
                    if time.monotonic() - drawn >= REDRAW:
                        yield
                        drawn = time.monotonic()
        if chat.stop.is_set() and not turn.finish_reason:
            turn.finish_reason, turn.note = "cancelled", _STOPPED
        elif turn.finish_reason == "length":
            turn.note = _LENGTH
        elif not turn.answer:
            turn.finish_reason, turn.note = "error", "The model gave an empty answer."
    except ServeError as error:
        turn.finish_reason, turn.note = "error", explain(error)
    except LlavaError as error:
        turn.finish_reason, turn.note = "error", str(error.args[0])
    finally:
        turn.running = False
        turn.finish_reason = turn.finish_reason or "cancelled"  # the page was closed
    yield


async def _until(stop: asyncio.Event, pieces: AsyncIterator[None]) -> AsyncGenerator[None, None]:
    """Items of `pieces` until `stop` is set, and a pulse while the next one is being waited for.

    The page's server closes what has no visitor any more only where it yields, so a silent worker must not keep it.
    """
    stopping = asyncio.ensure_future(stop.wait())
    step: asyncio.Future[bool | None] | None = None
    try:
        while not stop.is_set():
            step = step or asyncio.ensure_future(anext(pieces, False))
            await asyncio.wait((step, stopping), timeout=_PULSE, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                if step.result() is False:
                    return
                step = None
            yield
    finally:
        stopping.cancel()
        if step is not None and not step.done():
            step.cancel()
            await asyncio.wait((step,))


async def _pieces(client: ServiceClient, chat: Chat, turn: Turn) -> AsyncGenerator[None, None]:
    address = await client.address(turn.model)
    status = await _status(client, address)
    chat.template = choose_template(status, turn.model)
    body = await asyncio.to_thread(request_body, chat, turn, status)
    delta = body.get("stream_mode") == "delta"
    async with aclosing(client.stream(address, body)) as frames:
        async for frame in frames:
            text = str(frame.get("text", ""))
            turn.answer = turn.answer + text if delta else text[len(body["prompt"]) :].strip()
            turn.finish_reason = str(frame.get("finish_reason") or "")
            yield
    turn.answer = turn.answer.strip()
    turn.finish_reason = turn.finish_reason or "stop"  # older workers just end


async def _status(client: ServiceClient, address: str) -> WorkerStatus | None:
    try:
        return await client.status(address)
    except ServeError as error:
        if error.kind is ErrorType.WORKER_UNAVAILABLE:
            logger.warning("A worker is not at its address %s: %s", address, error.message)  # not for visitors
            raise
        logger.warning("The worker does not describe itself: %s", error.message)
        return None


def choose_template(status: WorkerStatus | None, model: str) -> str:
    """The template that the worker names; else, and if this version does not know it, a guess from the model's name."""
    named = status.info.conv_template if status and status.info else None
    try:
        return template_for(SimpleNamespace(conv_template=named), model)
    except TemplateError:
        logger.warning("The worker asks for template %r, which is not known here.", named)
        return template_for(SimpleNamespace(), model)


def request_body(chat: Chat, turn: Turn, status: WorkerStatus | None) -> dict[str, Any]:
    """The body of `/worker_generate_stream` (spec/serve.md §8.5); raises `ServeError` for too many pictures.

    A worker that says so gets turns as well as text, and sends only what is new. Every picture goes once: no worker
    here reads `org_images`.
    """
    conversation, pictures, modes = chat.conversation()
    info = status.info if status else None
    if info and pictures and not info.image_tokens:
        raise ServeError(ErrorType.BAD_IMAGE, f"{turn.model} reads text only")
    if info and len(pictures) > info.max_images:
        message = f"the conversation has {len(pictures)} pictures, {turn.model} takes {info.max_images}"
        raise ServeError(ErrorType.IMAGE_COUNT_MISMATCH, message)
    limit = min(turn.sampling.max_new_tokens, info.max_new_tokens if info else turn.sampling.max_new_tokens)
    body = {
        "model": turn.model,
        "prompt": conversation.get_prompt(),
        "temperature": float(turn.sampling.temperature),
        "top_p": float(turn.sampling.top_p),
        "max_new_tokens": int(limit),
        "max_input_tiles": int(turn.sampling.max_input_tiles),
        "stop": stop_strings(get_template(chat.template))[0],
        "images": [picture.sent(mode) for picture, mode in zip(pictures, modes, strict=True)],
    }
    features = status.features if status else []
    if "delta" in features:
        body["stream_mode"] = "delta"
    if "messages" in features:
        user, _ = conversation.roles
        said = conversation.dict()["messages"][conversation.offset :]
        body["messages"] = [
            {"role": "user" if role == user else "assistant", "content": text} for role, text in said if text
        ]
    return body
