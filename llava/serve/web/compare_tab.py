"""Comparison tab: one message to two models, side by side, with a vote."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Final

import gradio as gr

from llava.errors import LlavaError
from llava.serve.web import controls
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.chat_tab import Updates
from llava.serve.web.services import AppServices, GalleryFile, visitor

VOTES: Final = {
    "leftvote": "Left is better",
    "rightvote": "Right is better",
    "tievote": "Equally good",
    "bothbad_vote": "Equally bad",
}


@dataclass(frozen=True)
class CompareTab:
    """Components of the tab, with pairs for left and right; the methods are their event handlers."""

    services: AppServices
    states: tuple[gr.State, gr.State]
    models: tuple[gr.Dropdown, gr.Dropdown]
    views: tuple[gr.Chatbot, gr.Chatbot]
    images: gr.Gallery
    mode: gr.Radio
    parameters: controls.Parameters
    text: gr.Textbox
    send_button: gr.Button
    notice: gr.Markdown
    votes: tuple[gr.Button, ...]
    stop: gr.Button
    clear_button: gr.Button

    async def send(
        self,
        left: Chat,
        request: gr.Request,
        right: Chat,
        text: str | None,
        files: Sequence[GalleryFile] | None,
        left_model: str | None,
        right_model: str | None,
        mode: str,
        *values: float,
    ) -> AsyncGenerator[Updates, None]:
        """Send one message to both models and show both answers as they grow."""
        text = (text or "").strip()
        running = left.running or right.running
        if running or not (text or files):
            yield {self.notice: gr.skip() if running else controls.EMPTY_MESSAGE}
            return
        sampling = controls.sampling_from(values)
        try:
            turn = await self.services.new_turn(left_model, text, files or (), mode, sampling)
            if not right_model:
                raise controls.no_model()
        except LlavaError as error:
            yield {self.notice: controls.warning(error)}
            return
        other = Turn(text, turn.images, mode, sampling, right_model)
        update = {self.text: "", self.images: None, self.notice: "", **self.buttons(vote=False, running=True)}
        async with AsyncExitStack() as stack:
            runs = [
                await stack.enter_async_context(aclosing(self.services.run(chat, new, visitor(request))))
                for chat, new in ((left, turn), (right, other))
            ]
            async for _ in await stack.enter_async_context(aclosing(merged(runs))):
                yield {**update, **self._shown(left, right)}
                update = {}
        yield {**self._shown(left, right), **self.buttons(vote=bool(turn.answer or other.answer), running=False)}

    def _shown(self, left: Chat, right: Chat) -> Updates:
        return {view: chat.shown() for view, chat in zip(self.views, (left, right), strict=True)}

    def buttons(self, *, vote: bool, running: bool, clear: bool = True) -> Updates:
        """Updates that enable or disable the buttons."""
        return {
            **{button: gr.update(interactive=vote) for button in self.votes},
            self.stop: gr.update(interactive=running),
            self.clear_button: gr.update(interactive=clear and not running),
            self.send_button: gr.update(interactive=not running),
        }

    async def halt(self, left: Chat, right: Chat) -> None:
        """Stop both running answers."""
        left.stop.set()
        right.stop.set()

    async def clear(self, left: Chat, right: Chat) -> Updates:
        await self.halt(left, right)
        left.turns.clear()
        right.turns.clear()
        empty: Updates = {self.views[0]: [], self.views[1]: [], self.text: "", self.images: None, self.notice: ""}
        return {**empty, **self.buttons(vote=False, running=False, clear=False)}

    async def vote(self, kind: str, left: Chat, right: Chat, request: gr.Request) -> Updates:
        """Record the vote; further votes are ignored."""
        if not (left.turns and right.turns) or left.running or right.running or left.turns[-1].vote:
            return {self.notice: gr.skip()}
        left.turns[-1].vote = right.turns[-1].vote = kind
        models = [chat.turns[-1].model for chat in (left, right)]
        states = [chat.conversation()[0].dict() for chat in (left, right)]
        notice = self.services.log.vote(kind, left, visitor(request), models=models, states=states)
        return {self.notice: notice, **{b: gr.update(interactive=False) for b in self.votes}}

    def connect(self) -> None:
        """Bind the events of the components."""
        left, right = self.states
        inputs = [left, right, self.text, self.images, *self.models, self.mode, *self.parameters.all()]
        outputs = [*self.views, self.text, self.images, self.notice, self.send_button, self.stop, self.clear_button]
        outputs += self.votes
        gr.on([self.text.submit, self.send_button.click], self.send, inputs, outputs, **controls.PRIVATE)
        self.stop.click(self.halt, [left, right], None, **controls.IMMEDIATE)
        clearing = [self.clear_button.click, *(view.clear for view in self.views)]
        gr.on(clearing, self.clear, [left, right], outputs, **controls.IMMEDIATE)
        for kind, button in zip(VOTES, self.votes, strict=True):
            button.click(_vote_handler(self, kind), [left, right], outputs, **controls.IMMEDIATE)


def _vote_handler(tab: CompareTab, kind: str) -> Callable[[Chat, Chat, gr.Request], Awaitable[Updates]]:
    async def vote(left: Chat, right: Chat, request: gr.Request) -> Updates:
        return await tab.vote(kind, left, right, request)

    return vote


async def merged(iterators: Sequence[AsyncIterator[None]]) -> AsyncGenerator[None, None]:
    """Yield after every item of any iterator, until all are exhausted."""
    steps = {asyncio.ensure_future(anext(each, False)): each for each in iterators}
    try:
        while steps:
            done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            for step in done:
                each = steps.pop(step)
                if step.result() is not False:
                    steps[asyncio.ensure_future(anext(each, False))] = each
            yield
    finally:
        for step in steps:
            step.cancel()
        if steps:
            await asyncio.wait(steps)


def build(services: AppServices, icons: Mapping[str, str]) -> CompareTab:
    """Create the tab; the two answers are stacked on a narrow page."""
    states = (gr.State(Chat()), gr.State(Chat()))
    with gr.Row(elem_classes="pair"):
        columns = []
        for side in ("left", "right"):
            with gr.Column(min_width=300):
                model = gr.Dropdown([], label=f"Model, {side}", elem_id=f"model_{side}", interactive=True)
                columns.append((model, controls.chat_view(f"chatbot_{side}", side.capitalize(), "", height=420)))
    notice = gr.Markdown("", elem_id="compare_notice")
    text, send = controls.message_box("compare_message", "compare_send")
    with gr.Row(elem_classes="buttons"):
        votes = tuple(controls.action_button(name, kind, icons[kind], min_width=130) for kind, name in VOTES.items())
        stop, clear = (
            controls.action_button(name.capitalize(), f"compare_{name}", icons[name]) for name in ("stop", "clear")
        )
    with gr.Row(elem_classes="pair"):
        with gr.Column(min_width=300):
            images = controls.image_box("compare_images")
        with gr.Column(min_width=300):
            mode = controls.mode_choice()
            parameters = controls.parameter_sliders()
    (left_model, left_view), (right_model, right_view) = columns
    tab = CompareTab(
        services, states, (left_model, right_model), (left_view, right_view), images, mode, parameters, text, send,
        notice, votes, stop, clear,
    )  # fmt: skip
    tab.connect()
    return tab
