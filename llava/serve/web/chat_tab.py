"""The first tab: one conversation with one model, as laid out in spec/serve.md §8.3 and §8.4."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llava.errors import LlavaError
from llava.serve.web import controls
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.site import Site, export, visitor

Updates = dict[Any, Any]


@dataclass(frozen=True)
class ChatTab:
    """The components of the tab; its methods are what they do."""

    site: Site
    state: Any
    model: Any
    pictures: Any
    mode: Any
    parameters: controls.Parameters
    view: Any
    text: Any
    send_button: Any
    notice: Any
    stop: Any
    votes: tuple[Any, Any, Any]
    again: Any
    clear_button: Any
    save: Any
    saved: Any

    async def send(
        self,
        chat: Chat,
        request: gr.Request,
        text: str | None,
        files: Sequence[Any] | None,
        model: str | None,
        mode: str,
        *sampling: float,
    ) -> AsyncGenerator[Updates, None]:
        """Add the message to the conversation and answer it."""
        text = (text or "").strip()
        if chat.running or not (text or files):
            yield {self.notice: gr.skip() if chat.running else controls.NOTHING}
            return
        try:
            turn = await self.site.new_turn(model, text, files or (), mode, controls.sampling_from(sampling))
        except LlavaError as error:
            yield {self.notice: controls.warning(error)}
            return
        async with aclosing(self._run(chat, turn, {self.text: "", self.pictures: None}, request)) as updates:
            async for update in updates:
                yield update

    async def regenerate(
        self, chat: Chat, request: gr.Request, model: str | None, mode: str, *sampling: float
    ) -> AsyncGenerator[Updates, None]:
        """Ask the last message again, with the settings as they are now."""
        if chat.running or not chat.turns:
            yield {self.notice: gr.skip()}
            return
        if not model:
            yield {self.notice: controls.warning(controls.no_model())}
            return
        last = chat.turns.pop()
        turn = Turn(last.text, last.pictures, mode, controls.sampling_from(sampling), model)
        async with aclosing(self._run(chat, turn, {}, request)) as updates:
            async for update in updates:
                yield update

    async def _run(self, chat: Chat, turn: Turn, first: Updates, request: gr.Request) -> AsyncGenerator[Updates, None]:
        update = {**first, self.notice: "", **self.buttons(vote=False, again=False, running=True)}
        async with aclosing(self.site.run(chat, turn, visitor(request))) as steps:
            async for _ in steps:
                yield {**update, self.view: chat.shown()}
                update = {}
        answered = turn.finish_reason != "error" and bool(turn.answer)
        yield {self.view: chat.shown(), **self.buttons(vote=answered, again=True, running=False)}

    def buttons(self, *, vote: bool, again: bool, running: bool) -> Updates:
        """States of the buttons."""
        states = {**dict.fromkeys(self.votes, vote), self.again: again, self.clear_button: again, self.save: again}
        return {
            **{button: gr.update(interactive=state) for button, state in states.items()},
            self.stop: gr.update(interactive=running),
            self.send_button: gr.update(interactive=not running),
        }

    async def halt(self, chat: Chat) -> None:
        """Stop the running answer; the worker stops too."""
        chat.stop.set()

    async def clear(self, chat: Chat) -> Updates:
        chat.stop.set()
        chat.turns.clear()
        empty: Updates = {self.view: [], self.text: "", self.pictures: None, self.notice: ""}
        return {**empty, **self.buttons(vote=False, again=False, running=False)}

    async def vote(self, kind: str, chat: Chat, request: gr.Request) -> Updates:
        """Record a vote on the last answer, once."""
        if not chat.turns or chat.running or chat.turns[-1].vote:
            return {self.notice: gr.skip()}
        chat.turns[-1].vote = kind
        told = self.site.log.vote(kind, chat, visitor(request))
        return {self.notice: told, **{b: gr.update(interactive=False) for b in self.votes}}

    async def export(self, chat: Chat) -> str:
        return export(chat)

    def connect(self) -> None:
        """Bind the components' events. Everything runs on the server's event loop, and nothing is a public endpoint."""
        settings = [self.model, self.mode, *self.parameters.all()]
        changing = [self.view, self.text, self.pictures, self.notice, self.send_button, self.stop]
        outputs = [*changing, *self.votes, self.again, self.clear_button, self.save]
        inputs = [self.state, self.text, self.pictures, *settings]
        gr.on([self.text.submit, self.send_button.click], self.send, inputs, outputs, **controls.PRIVATE)
        self.again.click(self.regenerate, [self.state, *settings], outputs, **controls.PRIVATE)
        self.stop.click(self.halt, [self.state], None, **controls.AT_ONCE)
        # the view's own waste-paper basket empties the view only
        gr.on([self.clear_button.click, self.view.clear], self.clear, [self.state], outputs, **controls.AT_ONCE)
        for kind, button in zip(("upvote", "downvote", "flag"), self.votes, strict=True):
            button.click(_voting(self, kind), [self.state], outputs, **controls.AT_ONCE)
        saving = self.save.click(self.export, [self.state], [self.saved], **controls.AT_ONCE)
        saving.then(None, [self.saved], None, js=controls.SAVE_AS_FILE, **controls.AT_ONCE)


def _voting(tab: ChatTab, kind: str) -> Any:
    async def vote(chat: Chat, request: gr.Request) -> Updates:
        return await tab.vote(kind, chat, request)

    return vote


def build(site: Site, examples: Sequence[tuple[str, str]], icons: Mapping[str, str]) -> ChatTab:
    """Lay out the tab. On a wide page controls stand left of the chat, on a narrow one above and below it."""
    state = gr.State(Chat())
    with gr.Row(elem_classes="page"):
        with gr.Column(elem_classes="side", min_width=200):
            model = gr.Dropdown([], label="Model", elem_id="model_selector_row", interactive=True)
            pictures = controls.picture_box("picture_box")
        with gr.Column(elem_classes="talk", min_width=200):
            view = controls.chat_view("chatbot", "InternVL-Chat", "Add a picture and ask about it.", height=550)
            notice = gr.Markdown("", elem_id="notice")
            text, send = controls.message_box("message", "send")
            with gr.Row(elem_id="buttons", elem_classes="buttons"):
                up, down, flag, again, stop, clear, save = (
                    controls.action_button(name, name.lower(), icons[name.lower()])
                    for name in ("Upvote", "Downvote", "Flag", "Regenerate", "Stop", "Clear", "Save")
                )
            saved = gr.Textbox(visible=False)
        with gr.Column(elem_classes="more", min_width=200):
            mode = controls.mode_choice()
            controls.example_buttons(examples, pictures, text)
            parameters = controls.parameter_sliders()
    tab = ChatTab(
        site, state, model, pictures, mode, parameters, view, text, send, notice, stop, (up, down, flag), again, clear,
        save, saved,
    )  # fmt: skip
    tab.connect()
    return tab
