"""Answers of the chat: find a worker, render the conversation in its template, follow its stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Final

from llava.conversation import get_template, stop_strings, template_for
from llava.errors import LlavaError, TemplateError
from llava.serve.common.protocol import ErrorType, ServeError, WorkerStatus
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.client import ServiceClient
from llava.serve.web.errors import explain

logger = logging.getLogger(__name__)
REDRAW: Final = 0.1  # seconds between two updates of a growing answer
_PULSE: Final = 0.5
_LENGTH: Final = "The answer was cut off at the limit of output tokens."
_STOPPED: Final = "Stopped."


async def answer(client: ServiceClient, chat: Chat) -> AsyncGenerator[None, None]:
    """Answer the last turn of `chat`, yielding after every change to show, and at the end.

    Setting `chat.stop` or closing the generator ends the answer and stops the worker. A failure becomes the note of the
    turn; the text received before it is kept.
    """
    turn = chat.turns[-1]
    try:
        async with aclosing(_stream(client, chat, turn)) as updates:
            drawn = 0.0
            async with aclosing(_until(chat.stop, updates)) as steps:
                async for _ in steps:
                    if time.monotonic() - drawn >= REDRAW:
                        yield
                        drawn = time.monotonic()
        if chat.stop.is_set() and not turn.finish_reason:
            turn.finish_reason, turn.note = "cancelled", _STOPPED
        elif turn.finish_reason == "length":
            turn.note = _LENGTH
        elif not turn.answer:
            turn.finish_reason, turn.note = "error", "The model returned an empty answer."
    except ServeError as error:
        turn.finish_reason, turn.note = "error", explain(error)
    except LlavaError as error:
        turn.finish_reason, turn.note = "error", str(error.args[0])
    finally:
        turn.running = False
        turn.finish_reason = turn.finish_reason or "cancelled"  # the page was closed
    yield


async def _until(stop: asyncio.Event, updates: AsyncIterator[None]) -> AsyncGenerator[None, None]:
    """Items of `updates` until `stop` is set, and additional ones while a worker is silent.

    Gradio closes the generator of a visitor who has left only when it yields.
    """
    stopping = asyncio.ensure_future(stop.wait())
    step: asyncio.Future[bool | None] | None = None
    try:
        while not stop.is_set():
            step = step or asyncio.ensure_future(anext(updates, False))
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


async def _stream(client: ServiceClient, chat: Chat, turn: Turn) -> AsyncGenerator[None, None]:
    address = await client.address(turn.model)
    status = await _status(client, address)
    chat.template = choose_template(status, turn.model)
    body = await asyncio.to_thread(request_body, chat, turn, status)
    delta = body.get("stream_mode") == "delta"
    async with aclosing(client.stream(address, body)) as frames:
        async for frame in frames:
            text = str(frame.get("text", ""))
            turn.answer = turn.answer + text if delta else text[len(str(body["prompt"])) :].strip()
            turn.finish_reason = str(frame.get("finish_reason") or "")
            yield
    turn.answer = turn.answer.strip()
    turn.finish_reason = turn.finish_reason or "stop"  # older workers send no finish reason


async def _status(client: ServiceClient, address: str) -> WorkerStatus | None:
    try:
        return await client.status(address)
    except ServeError as error:
        if error.kind is ErrorType.WORKER_UNAVAILABLE:
            logger.warning(
                "Cannot reach the worker at %s: %s", address, error.message
            )  # the address is not shown to visitors
            raise
        logger.warning("The worker returned no valid status: %s", error.message)
        return None


def choose_template(status: WorkerStatus | None, model: str) -> str:
    """The worker's conversation template; the one for the model's name when it is absent or unknown."""
    named = status.template_of(model) if status else None
    try:
        return template_for(SimpleNamespace(conv_template=named), model)
    except TemplateError:
        logger.warning("The worker's template %r is unknown.", named)
        return template_for(SimpleNamespace(), model)


def request_body(chat: Chat, turn: Turn, status: WorkerStatus | None) -> dict[str, object]:
    """The body of `/worker_generate_stream`; raises `ServeError` for more images than the worker accepts.

    Workers with these features receive turns in addition to the prompt, and send deltas. `org_images` is omitted, since
    no worker of this project reads it.
    """
    conversation, images, modes = chat.conversation()
    info = status.info if status else None
    if info and images and 0 in (info.image_tokens, info.max_images):
        raise ServeError(ErrorType.BAD_IMAGE, f"{turn.model} accepts text only")
    if info and len(images) > info.max_images:
        message = f"the conversation has {len(images)} images, {turn.model} accepts {info.max_images}"
        raise ServeError(ErrorType.IMAGE_COUNT_MISMATCH, message)
    limit = min(turn.sampling.max_new_tokens, info.max_new_tokens if info else turn.sampling.max_new_tokens)
    prompt = conversation.get_prompt()
    body: dict[str, object] = {
        "model": turn.model,
        "prompt": prompt,
        "temperature": float(turn.sampling.temperature),
        "top_p": float(turn.sampling.top_p),
        "max_new_tokens": int(limit),
        "max_input_tiles": int(turn.sampling.max_input_tiles),
        "stop": stop_strings(get_template(chat.template))[0],
        "images": [image.encode(mode) for image, mode in zip(images, modes, strict=True)],
    }
    features = status.features if status else []
    if "delta" in features:
        body["stream_mode"] = "delta"
    if "text_spans" in features:
        body["text_spans"] = prompt.text_spans
    if "messages" in features:
        user, _ = conversation.roles
        messages = conversation.dict()["messages"][conversation.offset :]
        body["messages"] = [
            {"role": "user" if role == user else "assistant", "content": text} for role, text in messages if text
        ]
    return body
