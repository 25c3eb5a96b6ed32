"""Chat tab: a conversation with one model, and the history in the browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import gradio as gr

from llava.errors import LlavaError
from llava.serve.web import controls
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.history import Listed, restore, to_store
from llava.serve.web.services import AppServices, export, visitor

Updates = dict[gr.Component, object]
RUNNING: Final = "The model is still answering; stop it first."
FULL: Final = "This conversation is too large for the storage of the browser; save it as a file."
_LABELS: Final = {name: label for label, name in controls.VOTES.items()}


@dataclass(frozen=True)
class History:
    """Components of the drawer on the left of the page."""

    new: gr.Button
    save: gr.Button
    past: gr.Dataset
    delete: gr.Button


@dataclass(frozen=True)
class ChatTab:
    """Components of the tab; the methods are their event handlers."""

    services: AppServices
    state: gr.State
    model: gr.Dropdown
    view: gr.Chatbot
    notice: gr.Markdown
    box: gr.MultimodalTextbox
    settings: controls.Settings
    history: History
    text: gr.Textbox  # hidden; JSON for the browser
    examples: Sequence[tuple[str, str]] = ()  # paths of images, and questions

    async def send(
        self,
        chat: Chat,
        request: gr.Request,
        message: controls.Message | None,
        model: str | None,
        mode: str,
        *sampling: float,
    ) -> AsyncGenerator[Updates, None]:
        """Add the message to the conversation and answer it."""
        text, files = controls.parts(message)
        if chat.running or not (text or files):
            yield {self.notice: gr.skip() if chat.running else controls.EMPTY_MESSAGE}
            return
        try:
            with chat.prepared():
                turn = await self.services.new_turn(model, text, files, mode, controls.sampling_from(sampling))
        except LlavaError as error:
            yield {self.notice: controls.warning(error)}
            return
        async with aclosing(self._run(chat, turn, request)) as updates:
            async for update in updates:
                yield update

    async def regenerate(
        self, chat: Chat, request: gr.Request, model: str | None, mode: str, *sampling: float
    ) -> AsyncGenerator[Updates, None]:
        """Answer the last message again with the current settings."""
        if chat.running or not chat.turns:
            yield {self.notice: gr.skip()}
            return
        try:
            self.services.refuse_if_draining()
            if not model:
                raise controls.no_model()
        except LlavaError as error:
            yield {self.notice: controls.warning(error)}
            return
        last = chat.turns.pop()
        turn = Turn(last.text, last.images, mode, controls.sampling_from(sampling), model)
        async with aclosing(self._run(chat, turn, request, typed=True)) as updates:
            async for update in updates:
                yield update

    async def _run(
        self, chat: Chat, turn: Turn, request: gr.Request, *, typed: bool = False
    ) -> AsyncGenerator[Updates, None]:
        """Answer `turn`; `typed` keeps what is in the message box."""
        update, turns = {**controls.sending(self.box, keep=typed), self.notice: "", **self._idle(False)}, chat.turns
        async with aclosing(self.services.run(chat, turn, visitor(request))) as steps:
            async for _ in steps:
                yield {**update, **self._shown(chat)}
                update = {}
        if chat.turns is turns:  # otherwise a new conversation has begun
            yield {**self._shown(chat), **controls.idle(self.box), **self._idle(True)}

    def _shown(self, chat: Chat) -> Updates:
        return {
            self.view: gr.update(value=chat.shown(), feedback_value=[_LABELS.get(turn.vote) for turn in chat.turns])
        }

    def _idle(self, idle: bool) -> Updates:
        """Updates of the buttons that change the conversation."""
        return {
            button: gr.update(interactive=idle) for button in (self.history.new, self.history.save, self.history.delete)
        }

    async def halt(self, chat: Chat) -> None:
        """Stop the running answer and its worker."""
        chat.stop.set()

    async def clear(self, chat: Chat) -> Updates:
        """Start a new conversation; the previous one stays in the history."""
        chat.clear()
        return {self.notice: "", **self._shown(chat), **controls.idle(self.box), **self._idle(False)}

    async def vote(self, chat: Chat, request: gr.Request, data: gr.LikeData) -> Updates:
        """Record a vote on an answer, once."""
        index = data.index[0] if isinstance(data.index, (tuple, list)) else data.index
        turn = chat.turns[index // 2] if index // 2 < len(chat.turns) else None
        kind = controls.VOTES.get({True: "Like", False: "Dislike"}.get(data.liked, str(data.liked)))
        if turn is None or kind is None or turn.running or not turn.answer or turn.vote:
            return {self.notice: gr.skip(), **self._shown(chat)}
        turn.vote = kind
        return {self.notice: self.services.log.vote(kind, chat, visitor(request), turn=turn), **self._shown(chat)}

    async def fill(self, data: gr.SelectData) -> Updates:
        """Put an example into the message box, by its index: other data of the event could name any file."""
        path, text = self.examples[int(data.index)]
        return {self.box: {"text": text, "files": [path]}}

    async def export(self, chat: Chat) -> str:
        return export(chat)

    async def store(self, chat: Chat) -> str:
        return await asyncio.to_thread(to_store, replace(chat, turns=chat.turns[:]))  # reduces images

    async def list_past(self, stored: str, chat: Chat) -> Updates:
        """Show the titles in the browser's storage."""
        listed = Listed.model_validate_json(stored)
        chat.past = [name for _, name in listed.titles]
        return {
            self.history.past: gr.Dataset(samples=[[title] for title, _ in listed.titles]),
            self.notice: controls.warning(FULL) if listed.full else gr.skip(),
        }

    async def name(self, index: int, chat: Chat) -> str:
        """The id of the selected conversation, for the JavaScript handler that follows."""
        return chat.past[index]

    async def name_open(self, chat: Chat) -> str:
        return chat.chat_id

    async def reopen(self, chat: Chat, text: str) -> Updates:
        """Show a conversation from the browser's storage, where its visitor may have changed it, to be continued."""
        found = Chat()
        try:
            await asyncio.to_thread(restore, found, text)
            await self.services.moderate("\n".join(f"{turn.text}\n{turn.answer}" for turn in found.turns))
        except LlavaError as error:
            return {self.notice: controls.warning(error)}
        if chat.running:
            return {self.notice: controls.warning(RUNNING)}
        chat.turns[:] = found.turns
        chat.chat_id, chat.model, chat.template = found.chat_id, found.model, found.template
        listing = await self.services.catalog.listing()
        model = gr.update(value=chat.model) if chat.model in listing.models else gr.skip()
        return {**self._shown(chat), self.notice: "", self.model: model, **self._idle(True)}

    def connect(self, page: gr.Blocks) -> None:
        """Bind the events of the components; none becomes a public endpoint."""
        settings = [self.model, *self.settings.all()]
        past, delete, new, save = self.history.past, self.history.delete, self.history.new, self.history.save
        outputs = [self.view, self.box, self.notice, new, save, delete]
        listed = [past, self.notice]
        runs = [
            self.box.submit(self.send, [self.state, self.box, *settings], outputs, **controls.PRIVATE),
            self.view.retry(self.regenerate, [self.state, *settings], outputs, **controls.PRIVATE),
        ]
        for run in runs:
            stored = run.then(self.store, [self.state], [self.text], **controls.IMMEDIATE)
            js = "(text, state) => [window.llava.store(text), state]"
            stored.then(self.list_past, [self.text, self.state], listed, js=js, **controls.IMMEDIATE)
        self.box.stop(self.halt, [self.state], None, **controls.IMMEDIATE)
        self.view.like(self.vote, [self.state], [self.notice, self.view], **controls.IMMEDIATE)
        self.view.example_select(self.fill, None, [self.box], **controls.IMMEDIATE)
        # the trash icon of the chat view clears only the view
        gr.on([new.click, self.view.clear], self.clear, [self.state], outputs, **controls.IMMEDIATE)
        saving = save.click(self.export, [self.state], [self.text], **controls.IMMEDIATE)
        saving.then(None, [self.text], None, js="window.llava.save", **controls.IMMEDIATE)
        js = "(state, id) => [state, window.llava.find(id)]"
        named = past.click(self.name, [past, self.state], [self.text], **controls.IMMEDIATE)
        named.then(self.reopen, [self.state, self.text], [*outputs, self.model], js=js, **controls.IMMEDIATE)
        js = "(id, state) => [window.llava.remove(id), state]"
        cleared = delete.click(self.name_open, [self.state], [self.text], **controls.IMMEDIATE)
        cleared = cleared.then(self.list_past, [self.text, self.state], listed, js=js, **controls.IMMEDIATE)
        cleared.then(self.clear, [self.state], outputs, **controls.IMMEDIATE)
        js = "(text, state) => [window.llava.titles(), state]"
        page.load(self.list_past, [self.text, self.state], listed, js=js, **controls.IMMEDIATE)


def history_drawer(icons: Mapping[str, str]) -> History:
    with gr.Sidebar(label="Conversations", open=False, width=290, elem_id="history"):
        with gr.Row(elem_classes="buttons"):
            new, save, delete = (
                controls.icon_button(name, elem_id, icons[elem_id])
                for name, elem_id in (("New chat", "new"), ("Save", "save"), ("Delete", "delete"))
            )
        past = gr.Dataset(
            components=["textbox"], samples=[], label="Conversations in this browser", type="index",
            samples_per_page=1000, elem_id="past",
        )  # fmt: skip
    return History(new, save, past, delete)


def build(
    services: AppServices,
    page: gr.Blocks,
    settings: controls.Settings,
    history: History,
    examples: Sequence[tuple[str, str]],
) -> ChatTab:
    """Create the tab: one column with the model, the conversation and the message box."""
    state = gr.State(Chat())
    with gr.Column(elem_classes="talk"):
        model = gr.Dropdown(
            [], label="Model", show_label=False, container=False, elem_id="model_selector_row", interactive=True
        )
        view = controls.chat_view("chatbot", "Conversation", "## Ask about an image", votes=True, examples=examples)
        notice = gr.Markdown("", elem_id="notice", elem_classes="notice")
        box = controls.message_box("message")
        text = gr.Textbox(visible=False)
    tab = ChatTab(services, state, model, view, notice, box, settings, history, text, examples)
    tab.connect(page)
    return tab
