"""Comparison tab: one message to two models, side by side, with a vote; blind mode hides the names until the vote."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Final

import gradio as gr

from llava.errors import LlavaError, RequestError
from llava.serve.common.streaming import merged
from llava.serve.web import controls
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.chat_tab import Updates
from llava.serve.web.ratings import COLUMNS
from llava.serve.web.services import AppServices, visitor

VOTES: Final = {
    "leftvote": "Left is better",
    "rightvote": "Right is better",
    "tievote": "Equally good",
    "bothbad_vote": "Equally bad",
}
BLIND_NAMES: Final = ("Model A", "Model B")


@dataclass(frozen=True)
class CompareTab:
    """Components of the tab, with pairs for left and right; the methods are their event handlers."""

    services: AppServices
    states: tuple[gr.State, gr.State]
    models: tuple[gr.Dropdown, gr.Dropdown]
    blind: gr.Checkbox
    views: tuple[gr.Chatbot, gr.Chatbot]
    notice: gr.Markdown
    votes: tuple[gr.Button, ...]
    clear_button: gr.Button
    box: gr.MultimodalTextbox
    settings: controls.Settings
    table: gr.Dataframe

    async def send(
        self,
        left: Chat,
        request: gr.Request,
        right: Chat,
        message: controls.Message | None,
        blind: bool,
        left_model: str | None,
        right_model: str | None,
        mode: str,
        *values: float,
    ) -> AsyncGenerator[Updates, None]:
        """Send one message to both models and show both answers as they grow."""
        text, files = controls.parts(message)
        running = left.running or right.running
        if running or not (text or files):
            yield {self.notice: gr.skip() if running else controls.EMPTY_MESSAGE}
            return
        sampling = controls.sampling_from(values)
        async with AsyncExitStack() as stack:
            try:
                with left.prepared():  # until both have their turn
                    models = await self._draw(left, right) if blind else (left_model, right_model)
                    turn = await self.services.new_turn(models[0], text, files, mode, sampling)
                    if not models[1]:
                        raise controls.no_model()
                    other = Turn(text, turn.images, mode, sampling, models[1])
                    turns, runs = left.turns, []
                    for chat, new in ((left, turn), (right, other)):
                        run = aclosing(self.services.run(chat, new, visitor(request)))
                        runs.append(await stack.enter_async_context(run))
                        await anext(runs[-1])
            except LlavaError as error:
                yield {self.notice: controls.warning(error)}
                return
            update = {**controls.sending(self.box), self.notice: "", **self.buttons(vote=False, clear=False)}
            yield {**update, **self._shown(left, right, blind)}
            async for _ in await stack.enter_async_context(aclosing(merged(runs))):
                yield self._shown(left, right, blind)
        if left.turns is turns:  # otherwise a new conversation has begun
            yield {
                **self._shown(left, right, blind),
                **controls.idle(self.box),
                **self.buttons(vote=turn.answered and other.answered, clear=True),
            }

    async def _draw(self, left: Chat, right: Chat) -> tuple[str, str]:
        """The models of a blind comparison: those of the conversation, or two chosen at random."""
        if left.turns and right.turns:
            return left.turns[-1].model, right.turns[-1].model
        listing = await self.services.catalog.listing()
        if len(listing.models) < 2:
            raise RequestError(listing.reason or "A blind comparison needs two models; only one is served.")
        first, second = random.sample(listing.models, 2)
        return first, second

    def _shown(self, left: Chat, right: Chat, blind: bool) -> Updates:
        """Both conversations; names are hidden until a vote."""
        hidden = blind and not any(turn.vote for turn in left.turns)
        names = BLIND_NAMES if hidden else (None, None)
        return {view: chat.shown(name) for view, chat, name in zip(self.views, (left, right), names, strict=True)}

    def buttons(self, *, vote: bool, clear: bool) -> Updates:
        """Updates that enable or disable the buttons. Blind mode is switched before the first message."""
        return {
            **{button: gr.update(interactive=vote) for button in self.votes},
            self.clear_button: gr.update(interactive=clear),
            self.blind: gr.update(interactive=not clear and not vote),
        }

    async def halt(self, left: Chat, right: Chat) -> None:
        """Stop both running answers."""
        left.stop.set()
        right.stop.set()

    async def clear(self, left: Chat, right: Chat) -> Updates:
        left.clear()
        right.clear()
        empty: Updates = {self.views[0]: [], self.views[1]: [], self.notice: ""}
        return {**empty, **controls.idle(self.box), **self.buttons(vote=False, clear=False)}

    async def switch(self, blind: bool) -> Updates:
        """Hide the choice of models in blind mode."""
        return {model: gr.update(visible=not blind) for model in self.models}

    async def vote(self, kind: str, left: Chat, right: Chat, blind: bool, request: gr.Request) -> Updates:
        """Record the vote and name the models; further votes, and those on a failed answer, are ignored."""
        last = [chat.turns[-1] for chat in (left, right) if chat.turns]
        if len(last) < 2 or left.preparing or not all(turn.answered and not turn.vote for turn in last):
            return {self.notice: gr.skip()}
        blind = blind and not any(turn.vote for turn in left.turns)  # names are shown since the first vote
        left.turns[-1].vote = right.turns[-1].vote = kind
        models = [chat.turns[-1].model for chat in (left, right)]
        states = [chat.conversation()[0].dict() for chat in (left, right)]
        log = self.services.log
        notice = log.vote(kind, left, visitor(request), models=models, states=states, blind=blind)
        self.services.ratings.add(kind, models)
        return {
            self.notice: notice,
            self.table: self.services.ratings.rows(),
            **self._shown(left, right, blind),
            **{b: gr.update(interactive=False) for b in self.votes},
        }

    async def show_table(self) -> Updates:
        return {self.table: self.services.ratings.rows()}

    def connect(self, page: gr.Blocks) -> None:
        """Bind the events of the components."""
        left, right = self.states
        inputs = [left, right, self.box, self.blind, *self.models, *self.settings.all()]
        outputs = [*self.views, self.box, self.notice, self.clear_button, self.blind, *self.votes]
        self.box.submit(self.send, inputs, outputs, **controls.PRIVATE)
        self.box.stop(self.halt, [left, right], None, **controls.IMMEDIATE)
        clearing = [self.clear_button.click, *(view.clear for view in self.views)]
        gr.on(clearing, self.clear, [left, right], outputs, **controls.IMMEDIATE)
        self.blind.change(self.switch, [self.blind], list(self.models), **controls.IMMEDIATE)
        changed = [*self.views, self.notice, self.table, *self.votes]
        for kind, button in zip(VOTES, self.votes, strict=True):
            button.click(_vote_handler(self, kind), [left, right, self.blind], changed, **controls.IMMEDIATE)
        page.load(self.show_table, None, [self.table], **controls.IMMEDIATE)


def _vote_handler(tab: CompareTab, kind: str) -> Callable[[Chat, Chat, bool, gr.Request], Awaitable[Updates]]:
    async def vote(left: Chat, right: Chat, blind: bool, request: gr.Request) -> Updates:
        return await tab.vote(kind, left, right, blind, request)

    return vote


def build(services: AppServices, page: gr.Blocks, settings: controls.Settings, icons: Mapping[str, str]) -> CompareTab:
    """Create the tab; the two answers are stacked on a narrow page."""
    states = (gr.State(Chat()), gr.State(Chat()))
    with gr.Row(elem_classes="choices"):
        models = tuple(
            gr.Dropdown(
                [], label=f"Model, {side}", show_label=False, container=False, elem_id=f"model_{side}", min_width=120,
                interactive=True,
            )
            for side in ("left", "right")
        )  # fmt: skip
        blind = gr.Checkbox(label="Blind", container=False, elem_id="blind", min_width=80, scale=0)
    with gr.Row(elem_classes="pair"):
        placeholders = ("Both models answer the same message.", "Vote for the better answer.")
        views = tuple(
            controls.chat_view(f"chatbot_{side}", f"Conversation, {side}", placeholder)
            for side, placeholder in zip(("left", "right"), placeholders, strict=True)
        )
    notice = gr.Markdown("", elem_id="compare_notice", elem_classes="notice")
    with gr.Row(elem_classes="buttons votes"):
        votes = tuple(controls.icon_button(name, kind, icons[kind]) for kind, name in VOTES.items())
        clear = controls.icon_button("New", "compare_clear", icons["new"])
    box = controls.message_box("compare_message")
    with gr.Accordion("Votes", open=False):
        table = gr.Dataframe(headers=list(COLUMNS), interactive=False, elem_id="votes", show_label=False)
    tab = CompareTab(
        services,
        states,
        (models[0], models[1]),
        blind,
        (views[0], views[1]),
        notice,
        votes,
        clear,
        box,
        settings,
        table,
    )
    tab.connect(page)
    return tab
