"""Services behind the web page, shared by all visitors and both tabs."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final

import gradio as gr
import httpx

from llava.errors import ConfigError, RequestError
from llava.serve.common.middleware import Metrics
from llava.serve.web.answer import answer
from llava.serve.web.chat import Chat, Sampling, Turn
from llava.serve.web.client import ServiceClient
from llava.serve.web.images import load_images
from llava.serve.web.log import ConversationLog
from llava.serve.web.models import Listing, ModelCatalog
from llava.serve.web.ratings import Ratings
from llava.utils import MODERATION_URL

MAX_TEXT: Final = 20_000  # characters of a message


class Moderator:
    """Client of OpenAI's moderation endpoint; raises `ConfigError` unless `OPENAI_API_KEY` is set."""

    def __init__(
        self, *, url: str = MODERATION_URL, timeout: float = 5.0, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise ConfigError("--moderate requires OPENAI_API_KEY to be set.")
        self._url = url
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport)

    async def refusal(self, text: str) -> str | None:
        """The reason to reject `text`, None if it is accepted; a text that cannot be checked is rejected."""
        try:
            reply = await self._http.post(self._url, json={"input": " ".join(text.split())})
            reply.raise_for_status()
            flagged = reply.json()["results"][0]["flagged"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"The moderation service could not check your message ({type(error).__name__}); try again."
        return "Your message violates the content policy and was not sent; please change it." if flagged else None

    async def close(self) -> None:
        await self._http.aclose()


@dataclass
class AppServices:
    """Client, model list, log, moderation and metrics; the state of visitors is kept in their sessions."""

    client: ServiceClient
    catalog: ModelCatalog
    log: ConversationLog
    moderator: Moderator | None = None
    metrics: Metrics = field(default_factory=Metrics)
    ratings: Ratings = field(init=False)
    answers: int = 0  # in progress
    draining: bool = False

    def __post_init__(self) -> None:
        self.ratings = Ratings(self.log.directory)

    async def drain(self, grace: float) -> None:
        """Refuse new messages, let running answers finish for `grace` seconds, and close the connections."""
        self.draining = True
        deadline = time.monotonic() + grace
        while self.answers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self.close()

    async def close(self) -> None:
        await self.client.close()
        if self.moderator is not None:
            await self.moderator.close()

    async def new_turn(self, model: str | None, text: str, files: Sequence[str], mode: str, sampling: Sampling) -> Turn:
        """Create and validate a message; raises `LlavaError` when it cannot be sent."""
        self.refuse_if_draining()
        if not model:
            listing = await self.catalog.listing()
            raise RequestError(listing.reason or "No model is selected; select one.")
        if len(text) > MAX_TEXT:
            raise RequestError(f"A message may have at most {MAX_TEXT:,} characters, got {len(text):,}; shorten it.")
        turn = Turn(text, await asyncio.to_thread(load_images, files), mode, sampling, model)
        turn.check()
        await self.moderate(text)
        return turn

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise RequestError("This server is restarting; send the message again in a minute.")

    async def moderate(self, text: str) -> None:
        """Raise `RequestError` for a text that the moderation service refuses."""
        refusal = await self.moderator.refusal(text) if self.moderator is not None and text else None
        if refusal:
            raise RequestError(refusal)

    async def run(self, chat: Chat, turn: Turn, visitor: str) -> AsyncGenerator[None, None]:
        """Add a turn and answer it, yielding immediately and after every update."""
        chat.turns.append(turn)
        chat.model, chat.stop = turn.model, asyncio.Event()
        chat.chat_id = chat.chat_id or uuid.uuid4().hex
        asked = replace(chat)  # the visitor may start a new conversation meanwhile
        self.answers += 1
        try:
            yield
            async with aclosing(answer(self.client, asked)) as steps:
                async for _ in steps:
                    yield
        finally:
            self.answers -= 1
            turn.running = False
            if chat.turns is asked.turns:
                chat.template = asked.template
        finish = time.time()
        self.metrics.requests.labels(turn.finish_reason).inc()
        self.metrics.seconds.observe(finish - turn.started)
        self.log.chat(asked, turn, finish, visitor)

    def update_dropdown(
        self, listing: Listing, chat: Chat, current: str | None, *, other_than: str | None = None
    ) -> object:
        """Update of a model drop-down: its choices, and its value if the model was removed or returned.

        An existing conversation is never moved to another model.
        """
        value = current if current in listing.models else None
        if value is None and chat.model in listing.models:
            value = chat.model
        if value is None and not chat.turns:
            rest = [name for name in listing.models if name != other_than]
            value = self.catalog.preferred(Listing(tuple(rest) or listing.models))
        seen = (listing.models, value)
        if chat.seen == seen and current == value:
            return gr.skip()
        chat.seen = seen
        return gr.update(choices=list(listing.models), value=value)


def visitor(request: gr.Request | None) -> str:
    """Client address of a request; the forwarded one behind a proxy in `FORWARDED_ALLOW_IPS`."""
    client = getattr(request, "client", None)
    return str(getattr(client, "host", "") or "")


def unavailable_notice(listing: Listing, chat: Chat) -> str:
    """Notice when the model of a conversation is no longer served, else empty."""
    if chat.turns and chat.model and listing.models and chat.model not in listing.models:
        return f"{chat.model} is not served at the moment; wait for it, or select another model."
    return ""


def export(chat: Chat) -> str:
    """The conversation as JSON text; empty without turns."""
    return json.dumps(chat.export(), indent=2, ensure_ascii=False) if chat.turns else ""
