"""What all pages of the web server share, and the steps that both of its tabs take with a conversation."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from llava.errors import RequestError
from llava.serve.common.metrics import Metrics
from llava.serve.web.answer import answer
from llava.serve.web.chat import Chat, Sampling, Turn
from llava.serve.web.client import ServiceClient
from llava.serve.web.images import Picture, load_pictures
from llava.serve.web.log import ConversationLog
from llava.serve.web.models import Listing, ModelCatalog
from llava.serve.web.moderation import Moderator


@dataclass(frozen=True)
class Site:
    """The services behind the pages; what a visitor does is kept in the visitor's session."""

    client: ServiceClient
    catalog: ModelCatalog
    log: ConversationLog
    moderator: Moderator | None = None
    metrics: Metrics = field(default_factory=Metrics)

    async def close(self) -> None:
        await self.client.close()
        if self.moderator is not None:
            await self.moderator.close()

    async def new_turn(self, model: str | None, text: str, files: Sequence[Any], mode: str, sampling: Sampling) -> Turn:
        """A checked message; raises `LlavaError` saying why it cannot be sent."""
        if not model:
            listing = await self.catalog.listing()
            raise RequestError(listing.reason or "No model is chosen; choose one.")
        turn = Turn(text, self._pictures(files), mode, sampling, model)
        turn.check()
        if self.moderator is not None and text:
            refusal = await self.moderator.refusal(text)
            if refusal:
                raise RequestError(refusal)
        return turn

    async def run(self, chat: Chat, turn: Turn, visitor: str) -> AsyncGenerator[None, None]:
        """Add a turn and answer it, yielding at once and whenever there is more to show."""
        chat.turns.append(turn)
        chat.model = turn.model
        yield
        async with aclosing(answer(self.client, chat)) as steps:
            async for _ in steps:
                yield
        finish = time.time()
        self.metrics.requests.labels(turn.finish_reason).inc()
        self.metrics.seconds.observe(finish - turn.started)
        self.log.chat(chat, turn, finish, visitor)

    def follow(self, listing: Listing, chat: Chat, current: str | None, *, other_than: str | None = None) -> Any:
        """What a drop-down shows now: its choices, and its value if the one it had is gone or came back.

        A conversation is not moved to another model by itself.
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

    @staticmethod
    def _pictures(files: Sequence[Any]) -> tuple[Picture, ...]:
        return load_pictures([path for path, _ in files or ()])


def visitor(request: gr.Request | None) -> str:
    """The address a request came from; behind a proxy named in `FORWARDED_ALLOW_IPS`, the one it tells."""
    client = getattr(request, "client", None)
    return str(getattr(client, "host", "") or "")


def gone(listing: Listing, chat: Chat) -> str:
    """A sentence when the model of a conversation is no longer served."""
    if chat.turns and chat.model and listing.models and chat.model not in listing.models:
        return f"{chat.model} is not served at the moment; wait for it to come back, or choose another model."
    return ""


def export(chat: Chat) -> str:
    """The conversation as JSON text; empty when nothing was said."""
    return json.dumps(chat.export(), indent=2, ensure_ascii=False) if chat.turns else ""
