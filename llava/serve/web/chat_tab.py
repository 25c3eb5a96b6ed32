"""Chat tab: a conversation with one model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import gradio as gr

from llava.errors import LlavaError
from llava.serve.web import controls
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.services import AppServices, GalleryFile, export, visitor

Updates = dict[gr.Component, object]


@dataclass(frozen=True)
class ChatTab:
    """Components of the tab; the methods are their event handlers."""

    services: AppServices
    state: gr.State
    model: gr.Dropdown
    images: gr.Gallery
    mode: gr.Radio
    parameters: controls.Parameters
    view: gr.Chatbot
    text: gr.Textbox
    send_button: gr.Button
    notice: gr.Markdown
    stop: gr.Button
    votes: tuple[gr.Button, gr.Button, gr.Button]
    again: gr.Button
    clear_button: gr.Button
    save: gr.Button
    saved: gr.Textbox

    async def send(
        self,
        chat: Chat,
        request: gr.Request,
        text: str | None,
        files: Sequence[GalleryFile] | None,
        model: str | None,
        mode: str,
        *sampling: float,
    ) -> AsyncGenerator[Updates, None]:
        """Add the message to the conversation and answer it."""
        text = (text or "").strip()
        if chat.running or not (text or files):
            yield {self.notice: gr.skip() if chat.running else controls.EMPTY_MESSAGE}
            return
        try:
            turn = await self.services.new_turn(model, text, files or (), mode, controls.sampling_from(sampling))
        except LlavaError as error:
            yield {self.notice: controls.warning(error)}
            return
        async with aclosing(self._run(chat, turn, {self.text: "", self.images: None}, request)) as updates:
            async for update in updates:
                yield update

    async def regenerate(
        self, chat: Chat, request: gr.Request, model: str | None, mode: str, *sampling: float
    ) -> AsyncGenerator[Updates, None]:
        """Answer the last message again with the current settings."""
        if chat.running or not chat.turns:
            yield {self.notice: gr.skip()}
            return
        if not model:
            yield {self.notice: controls.warning(controls.no_model())}
            return
        last = chat.turns.pop()
        turn = Turn(last.text, last.images, mode, controls.sampling_from(sampling), model)
        async with aclosing(self._run(chat, turn, {}, request)) as updates:
            async for update in updates:
                yield update

    async def _run(self, chat: Chat, turn: Turn, first: Updates, request: gr.Request) -> AsyncGenerator[Updates, None]:
        update = {**first, self.notice: "", **self.buttons(vote=False, again=False, running=True)}
        async with aclosing(self.services.run(chat, turn, visitor(request))) as steps:
            async for _ in steps:
                yield {**update, self.view: chat.shown()}
                update = {}
        answered = turn.finish_reason != "error" and bool(turn.answer)
        yield {self.view: chat.shown(), **self.buttons(vote=answered, again=True, running=False)}

    def buttons(self, *, vote: bool, again: bool, running: bool) -> Updates:
        """Updates that enable or disable the buttons."""
        states = {**dict.fromkeys(self.votes, vote), self.again: again, self.clear_button: again, self.save: again}
        return {
            **{button: gr.update(interactive=state) for button, state in states.items()},
            self.stop: gr.update(interactive=running),
            self.send_button: gr.update(interactive=not running),
        }

    async def halt(self, chat: Chat) -> None:
        """Stop the running answer and its worker."""
        chat.stop.set()

    async def clear(self, chat: Chat) -> Updates:
        chat.stop.set()
        chat.turns.clear()
        empty: Updates = {self.view: [], self.text: "", self.images: None, self.notice: ""}
        return {**empty, **self.buttons(vote=False, again=False, running=False)}

    async def vote(self, kind: str, chat: Chat, request: gr.Request) -> Updates:
        """Record a vote on the last answer; further votes are ignored."""
        if not chat.turns or chat.running or chat.turns[-1].vote:
            return {self.notice: gr.skip()}
        chat.turns[-1].vote = kind
        notice = self.services.log.vote(kind, chat, visitor(request))
        return {self.notice: notice, **{b: gr.update(interactive=False) for b in self.votes}}

    async def export(self, chat: Chat) -> str:
        return export(chat)

    def connect(self) -> None:
        """Bind the events of the components; none becomes a public endpoint."""
        settings = [self.model, self.mode, *self.parameters.all()]
        changing = [self.view, self.text, self.images, self.notice, self.send_button, self.stop]
        outputs = [*changing, *self.votes, self.again, self.clear_button, self.save]
        inputs = [self.state, self.text, self.images, *settings]
        gr.on([self.text.submit, self.send_button.click], self.send, inputs, outputs, **controls.PRIVATE)
        self.again.click(self.regenerate, [self.state, *settings], outputs, **controls.PRIVATE)
        self.stop.click(self.halt, [self.state], None, **controls.IMMEDIATE)
        # the trash icon of the view clears only the view
        gr.on([self.clear_button.click, self.view.clear], self.clear, [self.state], outputs, **controls.IMMEDIATE)
        for kind, button in zip(("upvote", "downvote", "flag"), self.votes, strict=True):
            button.click(_vote_handler(self, kind), [self.state], outputs, **controls.IMMEDIATE)
        saving = self.save.click(self.export, [self.state], [self.saved], **controls.IMMEDIATE)
        saving.then(None, [self.saved], None, js=controls.SAVE_AS_FILE, **controls.IMMEDIATE)


def _vote_handler(tab: ChatTab, kind: str) -> Callable[[Chat, gr.Request], Awaitable[Updates]]:
    async def vote(chat: Chat, request: gr.Request) -> Updates:
        return await tab.vote(kind, chat, request)

    return vote


def build(services: AppServices, examples: Sequence[tuple[str, str]], icons: Mapping[str, str]) -> ChatTab:
    """Create the tab; the controls are left of the chat, or above and below it on a narrow page."""
    state = gr.State(Chat())
    with gr.Row(elem_classes="page"):
        with gr.Column(elem_classes="side", min_width=200):
            model = gr.Dropdown([], label="Model", elem_id="model_selector_row", interactive=True)
            images = controls.image_box("image_box")
        with gr.Column(elem_classes="talk", min_width=200):
            view = controls.chat_view("chatbot", "InternVL-Chat", "Add an image and ask about it.", height=550)
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
            controls.example_buttons(examples, images, text)
            parameters = controls.parameter_sliders()
    tab = ChatTab(
        services, state, model, images, mode, parameters, view, text, send, notice, stop, (up, down, flag), again,
        clear, save, saved,
    )  # fmt: skip
    tab.connect()
    return tab
