"""Event handlers of the page without a browser: button states, flags, and start orders."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import itertools
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI

from llava.errors import ConfigError
from llava.serve import gradio_web_server as server
from llava.serve.common.arguments import LOGINS_VARIABLE
from llava.serve.common.middleware import Keys, Limits, RequestMiddleware
from llava.serve.common.protocol import ErrorType, ServeError
from llava.serve.common.security import AddressRule
from llava.serve.common.streaming import merged
from llava.serve.control.registry import Registry
from llava.serve.web import chat_tab, controls
from llava.serve.web.chat import SKELETON, Chat, Turn
from llava.serve.web.chat_tab import RUNNING, ChatTab, History
from llava.serve.web.client import ServiceClient
from llava.serve.web.compare_tab import BLIND_NAMES, VOTES, CompareTab
from llava.serve.web.log import ConversationLog
from llava.serve.web.models import Listing, ModelCatalog
from llava.serve.web.ratings import Ratings
from llava.serve.web.services import AppServices, unavailable_notice
from llava.serve.worker.app import make_worker_app
from llava.serve.worker.heartbeat import HeartBeat
from tests.serve.fake_service import FakeService, web_server
from tests.serve.gradio_client import MODEL_BOX, Visitor
from tests.serve.stubs import MODEL, Live, StubEngine, live_controller, live_worker, make_worker, png, post, until
from tests.serve.test_tools import adapter

REQUEST: Any = SimpleNamespace(client=SimpleNamespace(host="10.0.0.9"))
SLIDERS = (0.5, 0.9, 64, 12)


@pytest.fixture
def service() -> Iterator[FakeService]:
    with FakeService(models=["alpha", "beta"]).serving() as running:
        yield running


@pytest.fixture
def services(service: FakeService, tmp_path: Path) -> AppServices:
    # every handler below has its own event loop, so no connection may outlive it
    transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
    client = ServiceClient(service.url, transport=transport)
    return AppServices(client, ModelCatalog(client, mode="reload"), ConversationLog(tmp_path / "logs", chats=True))


@pytest.fixture
def tab(services: AppServices) -> ChatTab:
    """The tab with names in place of components."""
    return make_tab(services)


def make_tab(services: AppServices) -> ChatTab:
    settings = controls.Settings("mode", "t", "p", "n", "k")
    history = History("new", "save", "past", "delete")
    return ChatTab(services, "state", "model", "view", "notice", "box", settings, history, "json")


@pytest.fixture
def pair(services: AppServices) -> CompareTab:
    settings = controls.Settings("mode", "t", "p", "n", "k")
    ends = (("left", "right"), ("model_left", "model_right"), "blind", ("view_left", "view_right"))
    return CompareTab(services, *ends, "notice", tuple(VOTES), "clear", "box", settings, "table")


@pytest.fixture
def chart(tmp_path: Path) -> list[str]:
    """The files of the message box."""
    (tmp_path / "chart.png").write_bytes(png(40, 30))
    return [str(tmp_path / "chart.png")]


class Page:
    """The last state of every component, after the updates of a handler."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.now: dict[str, Any] = {}

    def apply(self, update: dict[str, Any]) -> None:
        for name, value in update.items():
            if isinstance(value, dict) and value.get("__type__") == "update":
                known = self.now.get(name)
                self.now[name] = {**(known if isinstance(known, dict) else {}), **value}
            else:
                self.now[name] = value
        self.states.append(dict(self.now))

    def play(self, updates: AsyncIterator[dict[str, Any]]) -> Page:
        async def go() -> None:
            async for update in updates:
                self.apply(update)

        asyncio.run(go())
        return self

    @property
    def answer(self) -> str:
        """Markdown of the last answer, without the model's name."""
        return answer_of(self.now["view"]["value"])

    @property
    def running(self) -> bool:
        """Whether the message box offers Stop."""
        return bool(self.now["box"]["stop_btn"])


def answer_of(messages: list[dict[str, Any]]) -> str:
    _, *parts = messages[-1]["content"]
    return "\n\n".join(parts)


def send(tab: ChatTab, chat: Chat, text: str = "What?", files: Any = None, model: str | None = "alpha") -> Page:
    message: controls.Message = {"text": text, "files": files or []}
    return Page().play(tab.send(chat, REQUEST, message, model, "Default", *SLIDERS))


def like(index: int, liked: bool | str = True) -> gr.LikeData:
    return gr.LikeData(None, {"index": index, "value": "", "liked": liked})


# --- the chat -------------------------------------------------------------------------------------------------------


def test_a_message_is_answered(tab: ChatTab, service: FakeService, chart: Any, tmp_path: Path) -> None:
    service.delay = 0.15
    chat = Chat()
    page = send(tab, chat, " What is this? ", chart)
    first, last = page.states[0], page.states[-1]
    assert first["box"] == gr.update(value=controls.NO_MESSAGE, submit_btn=False, stop_btn=True)
    assert first["new"]["interactive"] is first["save"]["interactive"] is False
    assert SKELETON in answer_of(first["view"]["value"])
    assert [m["role"] for m in last["view"]["value"]] == ["user", "assistant"]
    assert last["view"]["value"][0]["content"][0]["path"] == chart[0]
    assert last["view"]["value"][1]["content"] == ['<span class="model-name">alpha</span>', "A red circle."]
    assert not page.running and last["box"]["submit_btn"] and last["save"]["interactive"]
    assert any("▌" in answer_of(state["view"]["value"]) for state in page.states)
    sent = service.requests[0]
    assert sent["prompt"].endswith("USER: <image>\nWhat is this? ASSISTANT:") and len(sent["images"]) == 1
    assert (sent["temperature"], sent["top_p"], sent["max_new_tokens"]) == (0.5, 0.9, 64)
    (line,) = [json.loads(x) for x in next((tmp_path / "logs").glob("*-conv.json")).read_text().splitlines()]
    assert line["type"] == "chat" and line["ip"] == "10.0.0.9" and line["finish"] >= line["start"]


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_nothing_to_send_changes_nothing(text: str | None, tab: ChatTab, service: FakeService) -> None:
    chat = Chat()
    message: Any = None if text is None else {"text": text, "files": []}
    page = Page().play(tab.send(chat, REQUEST, message, "alpha", "Default", *SLIDERS))
    assert chat.turns == [] and page.now == {"notice": controls.EMPTY_MESSAGE} and service.calls == []


def test_an_image_alone_is_a_message(tab: ChatTab, service: FakeService, chart: Any) -> None:
    send(tab, Chat(), "", chart)
    assert service.requests[0]["prompt"].endswith("USER: <image>\n ASSISTANT:")


def test_an_error_is_a_card_and_can_be_tried_again(tab: ChatTab, service: FakeService) -> None:
    service.answers["alpha"] = ["Half ", ServeError(ErrorType.OVERLOADED, "").frame()]
    chat = Chat()
    page = send(tab, chat)
    card = '<div class="error-card" role="alert"><strong>The model is busy (high traffic).</strong>'
    assert page.answer.startswith(f"Half\n\n{card}<p>Try again in a moment.</p><small>(error") and not page.running
    service.answers.clear()
    page = Page().play(tab.regenerate(chat, REQUEST, "beta", "Pad", *SLIDERS))
    assert page.answer == "A red circle." and len(chat.turns) == 1 and chat.turns[0].mode == "Pad"
    assert "value" not in page.states[0]["box"]  # a message that is being typed stays
    assert service.requests[0]["prompt"] == service.requests[1]["prompt"] and service.requests[1]["model"] == "beta"


@pytest.mark.parametrize(
    ("text", "files", "model", "words"),
    [
        ("What?", None, None, "No model is selected"),
        ("look <image>", None, "alpha", "1 &lt;image&gt; placeholder(s) but 0 image(s) attached"),
        ("What?", ["nowhere.png"], "alpha", "nowhere.png"),
        ("What?", ["x.png"] * 9, "alpha", "at most 8"),
        ("x" * 20_001, None, "alpha", "at most 20,000 characters, got 20,001"),
    ],
)
def test_what_cannot_be_sent_stays_in_the_box(
    text: str, files: Any, model: str | None, words: str, tab: ChatTab, service: FakeService
) -> None:
    chat = Chat()
    page = send(tab, chat, text, files, model)
    assert words in page.now["notice"] and "box" not in page.now and chat.turns == [] and service.requests == []


def test_an_empty_list_is_explained_when_sending(tab: ChatTab, service: FakeService) -> None:
    service.models = []
    assert "No worker has registered" in send(tab, Chat(), model=None).now["notice"]


def test_moderation_keeps_the_text_from_the_model(services: AppServices, tab: ChatTab, service: FakeService) -> None:
    async def refusal(text: str) -> str | None:
        return "refused, because" if "bad" in text else None

    moderated = AppServices(services.client, services.catalog, services.log, SimpleNamespace(refusal=refusal))  # type: ignore[arg-type]
    object.__setattr__(tab, "services", moderated)
    assert "refused, because" in send(tab, Chat(), "bad words").now["notice"] and service.requests == []
    chat, other = Chat(), Chat()
    assert send(tab, chat, "good words").answer == "A red circle."
    changed = asyncio.run(tab.store(chat)).replace("good words", "bad words")  # by the visitor, in the browser
    update: Any = asyncio.run(tab.reopen(other, changed))
    assert "refused, because" in update["notice"] and other.turns == []


def test_a_server_that_drains_answers_nothing_again(tab: ChatTab, service: FakeService) -> None:
    chat = Chat()
    send(tab, chat)
    tab.services.draining = True
    page = Page().play(tab.regenerate(chat, REQUEST, "alpha", "Default", *SLIDERS))
    assert "restarting" in page.now["notice"] and chat.turns[0].answer and len(service.requests) == 1


def test_stop_leaves_what_was_said(tab: ChatTab, service: FakeService) -> None:
    service.answers["alpha"], service.delay = ["word "] * 500, 0.02
    chat, page = Chat(), Page()

    async def go() -> None:
        async for update in tab.send(chat, REQUEST, {"text": "x", "files": []}, "alpha", "Default", *SLIDERS):
            page.apply(update)
            if chat.turns[0].answer:
                await tab.halt(chat)

    asyncio.run(go())
    assert page.answer.endswith('<div class="note">Stopped.</div>') and not page.running


def test_a_vote_counts_once(tab: ChatTab, tmp_path: Path) -> None:
    chat, page = Chat(), Page()
    send(tab, chat)
    send(tab, chat)
    for index, kind in ((1, False), (1, True), (3, "Flag"), (9, True), (3, "Unknown")):
        page.apply(asyncio.run(tab.vote(chat, REQUEST, like(index, kind))))
    lines = [json.loads(x) for x in next((tmp_path / "logs").glob("*-conv.json")).read_text().splitlines()]
    assert [line["type"] for line in lines] == ["chat", "chat", "downvote", "flag"]
    assert [line["turn_id"] for line in lines[:2]] == [line["turn_id"] for line in lines[2:]]
    assert lines[2]["temperature"] == 0.5 and page.now["view"]["feedback_value"] == ["Dislike", "Flag"]


def test_a_new_chat_is_empty(tab: ChatTab) -> None:
    chat = Chat()
    page, first = send(tab, chat), chat.chat_id
    page.apply(asyncio.run(tab.clear(chat)))
    assert chat.turns == [] and chat.chat_id != first
    assert page.now["view"]["value"] == [] and page.now["save"]["interactive"] is False
    assert asyncio.run(tab.export(chat)) == asyncio.run(tab.store(chat)) == ""


def test_every_conversation_has_its_own_record(tab: ChatTab) -> None:
    """Gradio copies the initial state for every session, so a reload of the page must not bring an id back."""
    initial = Chat()
    first, second = copy.deepcopy(initial), copy.deepcopy(initial)
    send(tab, first)
    send(tab, second)
    known = first.chat_id
    assert re.fullmatch("[0-9a-f]{32}", known) and known != second.chat_id
    send(tab, first)
    Page().play(tab.regenerate(first, REQUEST, "beta", "Pad", *SLIDERS))
    assert first.chat_id == known


def test_a_message_without_an_answer_does_not_damage_the_record(tab: ChatTab, service: FakeService, chart: Any) -> None:
    service.answers["alpha"] = [ServeError(ErrorType.OUT_OF_MEMORY, "").frame()]
    chat, other = Chat(), Chat()
    send(tab, chat, "one", chart)
    service.answers.clear()
    send(tab, chat, "two", chart)
    stored = asyncio.run(tab.store(chat))
    asyncio.run(tab.reopen(other, stored))
    assert [turn.text for turn in other.turns] == ["two"] and json.loads(stored)["title"] == "two"
    assert other.turns[0].images[0].data == chat.turns[1].images[0].data


def test_images_are_reduced_outside_the_event_loop(tab: ChatTab, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def record(*_: object) -> str:
        threads.append(threading.current_thread())
        return ""

    for name in ("to_store", "restore"):
        monkeypatch.setattr(chat_tab, name, record)
    asyncio.run(tab.store(Chat()))
    asyncio.run(tab.reopen(Chat(), "{}"))
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_a_conversation_is_stored_and_opened_again(tab: ChatTab, service: FakeService, chart: Any) -> None:
    chat, other, page = Chat(), Chat(), Page()
    send(tab, chat, "What is  this?", chart)
    send(tab, chat, "two")
    stored = asyncio.run(tab.store(chat))
    assert json.loads(stored)["title"] == "What is this?"
    page.apply(asyncio.run(tab.list_past(json.dumps({"titles": [["What is this?", chat.chat_id]]}), chat)))
    assert asyncio.run(tab.name(0, chat)) == asyncio.run(tab.name_open(chat)) == chat.chat_id
    assert page.now["past"].constructor_args["samples"] == [["What is this?"]]
    page.apply(asyncio.run(tab.reopen(other, stored)))
    assert page.now["model"]["value"] == "alpha" and page.answer == "A red circle."
    assert other.turns[0].images[0].data == chat.turns[0].images[0].data
    assert [replace(turn, started=0.0, turn_id="", images=()) for turn in other.turns] == [
        replace(turn, started=0.0, turn_id="", images=()) for turn in chat.turns
    ]
    service.requests.clear()
    for each in (chat, other):
        send(tab, each, "three")
    assert service.requests[0] == service.requests[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda item: None,
        lambda item: {**item, "id": "../x"},
        lambda item: {**item, "turns": []},
        lambda item: {**item, "images": []},
        lambda item: {**item, "images": ["data:image/png;base64,AAAA"]},
        lambda item: {**item, "images": ["file:///etc/passwd"]},
        lambda item: {**item, "images": [*item["images"], "data:image/png;base64,AAAA"]},
        lambda item: {**item, "images": [item["images"][0].replace("png", "html", 1)]},
        lambda item: {**item, "template": "nope"},
        lambda item: {**item, "turns": [{**item["turns"][0], "mode": "nope"}]},
    ],
)
def test_a_damaged_record_is_refused(
    damage: Any, tab: ChatTab, chart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    chat, other = Chat(), Chat()
    send(tab, chat, "What?", chart)
    item = damage(json.loads(asyncio.run(tab.store(chat))))
    update: Any = asyncio.run(tab.reopen(other, json.dumps(item)))
    assert "record in the browser is damaged" in update["notice"] and other.turns == []
    assert list(folder.iterdir()) == []


def test_a_running_conversation_is_not_replaced(tab: ChatTab) -> None:
    chat = Chat()
    send(tab, chat)
    stored = asyncio.run(tab.store(chat))
    chat.turns[-1].running = True
    update: Any = asyncio.run(tab.reopen(chat, stored))
    assert RUNNING in update["notice"] and asyncio.run(tab.store(chat)) == ""


def test_a_second_message_while_one_is_answered_is_ignored(tab: ChatTab, service: FakeService) -> None:
    chat = Chat()

    async def go() -> None:
        one, two = ({"text": text, "files": []} for text in ("one", "two"))
        first = tab.send(chat, REQUEST, one, "alpha", "Default", *SLIDERS)
        await anext(first)
        assert [u async for u in tab.send(chat, REQUEST, two, "alpha", "Default", *SLIDERS)]
        assert [u async for u in tab.regenerate(chat, REQUEST, "alpha", "Default", *SLIDERS)]
        await first.aclose()  # type: ignore[attr-defined]

    asyncio.run(go())
    assert [turn.text for turn in chat.turns] == ["one"]


def test_a_message_is_not_sent_twice_while_it_is_checked(tab: ChatTab, services: AppServices) -> None:
    chat = Chat()

    async def refusal(_: str) -> str | None:
        await asyncio.sleep(0.05)
        return None

    slow = AppServices(services.client, services.catalog, services.log, SimpleNamespace(refusal=refusal))  # type: ignore[arg-type]
    object.__setattr__(tab, "services", slow)

    async def press() -> None:
        async for _ in tab.send(chat, REQUEST, {"text": "one", "files": []}, "alpha", "Default", *SLIDERS):
            pass

    async def go() -> None:
        await asyncio.gather(press(), press())

    asyncio.run(go())
    assert [turn.text for turn in chat.turns] == ["one"] and not chat.running


def test_a_message_right_after_new_stops_the_old_answer(tab: ChatTab, service: FakeService, tmp_path: Path) -> None:
    service.answers, service.delay = {"alpha": ["word "] * 500, "beta": ["Done."]}, 0.02
    chat, page = Chat(), Page()

    async def go() -> None:
        old, new = (
            tab.send(chat, REQUEST, {"text": model, "files": []}, model, "Default", *SLIDERS)
            for model in ("alpha", "beta")
        )
        while not (chat.turns and chat.turns[0].answer):
            await anext(old)
        await tab.clear(chat)
        page.apply(await anext(new))  # before the old answer has seen that it was stopped
        assert page.running and all("box" not in update for update in [update async for update in old])
        async for update in new:
            page.apply(update)

    asyncio.run(go())
    until(lambda: service.broken_off == 1)
    assert [turn.text for turn in chat.turns] == ["beta"] and page.answer == "Done." and not page.running
    lines = [json.loads(x) for x in next((tmp_path / "logs").glob("*-conv.json")).read_text().splitlines()]
    reasons = {line["state"]["messages"][0][1]: line["finish_reason"] for line in lines}
    assert reasons == {"alpha": "cancelled", "beta": "stop"}


def test_the_second_turn_carries_the_first(tab: ChatTab, service: FakeService) -> None:
    chat = Chat()
    send(tab, chat, "one")
    send(tab, chat, "two")
    assert service.requests[1]["prompt"].startswith(service.requests[0]["prompt"])  # a prefix cache can reuse it
    assert "ASSISTANT: A red circle.</s>USER: two ASSISTANT:" in service.requests[1]["prompt"]


def test_an_image_reaches_an_engine_behind_the_adapter(tmp_path: Path, chart: Any) -> None:
    """Page, controller and adapter before an OpenAI-compatible server of unknown image tokens."""
    with (
        live_controller() as engine,
        live_worker(controller=engine.url) as worker,
        adapter(f"{engine.url}/v1") as (url, _),
        live_controller() as controller,
    ):
        assert post(controller.url, "/register_worker", {"worker_name": url, "check_heart_beat": False}).is_success
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
        client = ServiceClient(controller.url, transport=transport)
        services = AppServices(client, ModelCatalog(client), ConversationLog(tmp_path / "logs"))
        tab = make_tab(services)
        page = send(tab, Chat(), "What is this?", chart, "up")
        (job,) = worker.engine.history
    assert page.answer.startswith("w0 w1")
    assert [image.size for image in job.request.images] == [(40, 30)]


# --- side by side ---------------------------------------------------------------------------------------------------


def compare(
    pair: CompareTab,
    left: Chat,
    right: Chat,
    page: Page,
    models: tuple[str | None, str | None] = ("alpha", "beta"),
    *,
    files: Any = (),
    blind: bool = False,
) -> Page:
    message: controls.Message = {"text": "What?", "files": list(files)}
    return page.play(pair.send(left, REQUEST, right, message, blind, *models, "Default", *SLIDERS))


def test_two_models_are_compared(pair: CompareTab, service: FakeService, chart: Any, tmp_path: Path) -> None:
    service.answers["beta"] = ["A blue square."]
    left, right, page = Chat(), Chat(), Page()
    page.play(
        pair.send(left, REQUEST, right, {"text": "What?", "files": chart}, False, "alpha", "beta", "Default", *SLIDERS)
    )
    assert answer_of(page.now["view_left"]) == "A red circle."
    assert answer_of(page.now["view_right"]) == "A blue square."
    assert all(page.now[name]["interactive"] for name in VOTES) and not page.running
    first, second = service.requests
    assert first["prompt"] == second["prompt"] and first["images"] == second["images"]
    page.apply(asyncio.run(pair.vote("leftvote", left, right, False, REQUEST)))
    page.apply(asyncio.run(pair.vote("tievote", left, right, False, REQUEST)))
    votes = [json.loads(x) for x in next((tmp_path / "logs").glob("*-conv.json")).read_text().splitlines()]
    votes = [line for line in votes if "vote" in line["type"]]
    assert len(votes) == 1 and votes[0]["models"] == ["alpha", "beta"] and len(votes[0]["states"]) == 2
    assert page.now["table"] == [["alpha", 1, 1, 0, 0, 0, 100.0], ["beta", 1, 0, 1, 0, 0, 0.0]]
    page.apply(asyncio.run(pair.clear(left, right)))
    assert left.turns == right.turns == [] and page.now["clear"]["interactive"] is False
    again = AppServices(pair.services.client, pair.services.catalog, pair.services.log)
    assert again.ratings.rows() == page.now["table"]  # read from the log


def test_a_blind_comparison_names_the_models_after_the_vote(pair: CompareTab, tmp_path: Path) -> None:
    left, right, page = Chat(), Chat(), Page()
    for _ in range(2):
        compare(pair, left, right, page, ("alpha", "alpha"), blind=True)
    models = [{turn.model for turn in chat.turns} for chat in (left, right)]
    assert sorted(next(iter(names)) for names in models) == ["alpha", "beta"]
    assert [page.now[f"view_{side}"][1]["content"][0][25:32] for side in ("left", "right")] == list(BLIND_NAMES)
    assert "alpha" not in str(page.now) and "beta" not in str(page.now)
    page.apply(asyncio.run(pair.vote("tievote", left, right, True, REQUEST)))
    assert left.turns[0].model in str(page.now["view_left"]) and right.turns[0].model in str(page.now["view_right"])
    (line,) = [x for x in next((tmp_path / "logs").glob("*-conv.json")).read_text().splitlines() if "tievote" in x]
    assert json.loads(line)["blind"] is True


def test_only_the_first_vote_of_a_comparison_is_blind(pair: CompareTab, tmp_path: Path) -> None:
    left, right, page = Chat(), Chat(), Page()
    for _ in range(2):
        compare(pair, left, right, page, (None, None), blind=True)
        asyncio.run(pair.vote("tievote", left, right, True, REQUEST))
    lines = map(json.loads, next((tmp_path / "logs").glob("*-conv.json")).read_text().splitlines())
    assert [line["blind"] for line in lines if line["type"] == "tievote"] == [True, False]


def test_a_note_hides_the_name_of_the_model() -> None:
    turn = Turn("?", model="alpha", note="alpha accepts text only.", finish_reason="error", running=False)
    assert "alpha" in "".join(turn.shown()) and "alpha" not in "".join(turn.shown("Model A"))


def test_a_blind_comparison_needs_two_models(pair: CompareTab, service: FakeService) -> None:
    service.models = ["alpha"]
    page = compare(pair, Chat(), Chat(), Page(), (None, None), blind=True)
    assert "needs two models" in page.now["notice"] and service.requests == []


def test_ratings_skip_what_is_no_vote(tmp_path: Path) -> None:
    lines = [
        {"type": "leftvote", "models": ["a", "b"]},
        {"type": "bothbad_vote", "models": ["b", "a"]},
        {"type": "tievote", "models": ["a", "a"]},
        {"type": "upvote", "model": "a"},
        {"type": "leftvote", "models": ["a"]},
        ["x"],
    ]
    text = "\n".join([*map(json.dumps, lines), '{"type": "leftv'])
    (tmp_path / "2026-01-01-conv.json").write_text(text)
    assert Ratings(tmp_path).rows() == [["a", 2, 1, 0, 0, 1, 75.0], ["b", 2, 0, 1, 0, 1, 25.0]]


def test_one_that_fails_does_not_hide_the_other(pair: CompareTab, service: FakeService) -> None:
    service.answers["alpha"] = [ServeError(ErrorType.OUT_OF_MEMORY, "").frame()]
    left, right = Chat(), Chat()
    page = Page().play(
        pair.send(left, REQUEST, right, {"text": "?", "files": []}, False, "alpha", "beta", "Default", *SLIDERS)
    )
    assert "ran out of memory" in answer_of(page.now["view_left"])
    assert answer_of(page.now["view_right"]) == "A red circle."
    assert not any(page.now[name]["interactive"] for name in VOTES)
    page.apply(asyncio.run(pair.vote("rightvote", left, right, False, REQUEST)))
    assert pair.services.ratings.rows() == [] and not left.turns[0].vote


def test_two_enters_start_one_comparison(pair: CompareTab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the second one arrives after the message was checked, and before its answers start."""
    left, right, presses = Chat(), Chat(), []
    check = pair.services.new_turn

    async def press() -> None:
        message: controls.Message = {"text": "What?", "files": []}
        async for _ in pair.send(left, REQUEST, right, message, False, "alpha", "beta", "Default", *SLIDERS):
            pass

    async def checked(*values: Any) -> Turn:
        turn = await check(*values)
        if len(presses) < 2:
            presses.append(asyncio.ensure_future(press()))
        return turn

    async def go() -> None:
        presses.append(asyncio.ensure_future(press()))
        while pending := [press for press in presses if not press.done()]:
            await asyncio.gather(*pending)

    monkeypatch.setattr(pair.services, "new_turn", checked)
    asyncio.run(go())
    assert [len(left.turns), len(right.turns), len(presses)] == [1, 1, 2]


def test_a_comparison_needs_two_models(pair: CompareTab, service: FakeService) -> None:
    for models in ((None, "beta"), ("alpha", None)):
        page = compare(pair, Chat(), Chat(), Page(), models)
        assert "No model is selected" in page.now["notice"] and service.requests == []


def test_closing_a_merge_closes_its_parts() -> None:
    closed = []

    async def part(number: int) -> AsyncIterator[None]:
        try:
            while True:
                yield
                await asyncio.sleep(0.001 if number else 60)
        finally:
            closed.append(number)

    async def go() -> None:
        both = merged([part(0), part(1)])
        for _ in range(5):
            await anext(both)
        await both.aclose()  # type: ignore[attr-defined]

    asyncio.run(go())
    assert 0 in closed


# --- the drop-down --------------------------------------------------------------------------------------------------


def shown(services: AppServices, chat: Chat, current: str | None, *models: str) -> Any:
    return services.update_dropdown(Listing(models), chat, current)


def test_the_drop_down_follows_the_list(services: AppServices) -> None:
    chat = Chat()
    assert shown(services, chat, None) == gr.update(choices=[], value=None)
    assert shown(services, chat, None, "a", "b") == gr.update(choices=["a", "b"], value="a")
    assert shown(services, chat, "a", "a", "b") == gr.skip()
    assert shown(services, chat, "b", "a", "b")["value"] == "b"  # the visitor chose
    assert services.update_dropdown(Listing(("a", "b")), Chat(), None, other_than="a")["value"] == "b"
    assert services.update_dropdown(Listing(("a",)), Chat(), None, other_than="a")["value"] == "a"


def test_a_conversation_waits_for_its_model(services: AppServices, tab: ChatTab) -> None:
    chat = Chat()
    send(tab, chat)
    assert shown(services, chat, "alpha", "beta")["value"] is None
    assert "alpha is not served" in unavailable_notice(Listing(("beta",)), chat)
    assert (
        shown(services, chat, None, "alpha", "beta")["value"] == "alpha"
        and unavailable_notice(Listing(("alpha",)), chat) == ""
    )


# --- the program ----------------------------------------------------------------------------------------------------


def parse(*flags: str) -> argparse.Namespace:
    return server.build_parser().parse_args(list(flags))


def test_published_flags_are_known() -> None:
    args = parse("--controller", "http://c:1", "--model-list-mode", "reload", "--share", "--moderate", "--embed")
    assert args.controller_url == "http://c:1" and args.model_list_mode == "reload" and args.concurrency_count == 10
    assert parse().controller_url == "http://localhost:21001" and parse().model_list_mode == "once"
    assert parse("--controller-url", "http://d", "--host", "::1", "--port", "3", "--concurrency-count", "2").port == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--share"], "--share opens the page to everyone"),
        (["--concurrency-count", "0"], "at least 1"),
        (["--log-days", "0"], "at least 1"),
        (["--idle-timeout", "nan"], "greater than 0"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        server.check_share(server.WebArgs.from_cli_args(parse(*flags)), [])


def test_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOGINS_VARIABLE, "ann:one,bob:two:three")
    assert server.read_logins(None) == [("ann", "one"), ("bob", "two:three")]
    (tmp_path / "logins").write_text("nobody\n")
    with pytest.raises(ConfigError, match="USER:PASSWORD"):
        server.read_logins(tmp_path / "logins")


def test_a_taken_port_is_said() -> None:
    taken = server.listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(ConfigError, match="Cannot listen on"):
        server.listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


@pytest.mark.slow
def test_probes_and_closed_doors(service: FakeService, child_environment: dict[str, str], tmp_path: Path) -> None:
    environment = {**child_environment, LOGINS_VARIABLE: "ann:one", "LOGDIR": str(tmp_path)}
    environment["TMPDIR"] = str(tmp_path)
    with (
        web_server(service, environment, "--embed") as address,
        httpx.Client(base_url=address, trust_env=False, timeout=60) as client,
    ):
        until(lambda: reached(client, "/health"), 60)
        assert client.get("/ready").json() == {"models": ["alpha", "beta"]}
        service.models = []
        until(lambda: client.get("/ready").status_code == 503)
        assert "llava_requests" in client.get("/metrics").text
        assert client.get("/config").status_code == 401
        large = {"data": ["x" * 2**25], "fn_index": 0, "session_hash": "s"}
        assert client.post("/gradio_api/queue/join", json=large).status_code == 413
        upload = {"files": ("large.png", b"x" * 2**25)}
        assert client.post("/gradio_api/upload", files=upload).status_code == 401
        assert client.post("/login", data={"username": "ann", "password": "two"}).status_code == 400
        assert client.post("/login", data={"username": "ann", "password": "one"}).status_code == 200
        assert client.post("/gradio_api/upload", files=upload).status_code == 200
        assert '"username":"ann"' in client.get("/").text.replace(": ", ":")  # by which page.js keeps the history
        config = client.get("/config").json()
        assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404
        (folder,) = tmp_path.glob("llava-page-*")
        icons = {
            path for path in map(Path, re.findall(r'"path": "([^"]+)"', json.dumps(config))) if path.suffix == ".svg"
        }
        assert icons and all(path.is_file() and path.is_relative_to(folder) for path in icons)
    assert not folder.exists() and not (tmp_path / "gradio").exists()
    assert config["dependencies"] and {d["api_visibility"] for d in config["dependencies"]} == {"private"}
    assert "google" not in json.dumps(config)  # no fonts from elsewhere
    assert "Terms of use" not in json.dumps(config)  # --embed


@pytest.mark.slow
def test_a_visitor_cannot_name_files_of_the_server(
    service: FakeService, child_environment: dict[str, str], tmp_path: Path
) -> None:
    """Neither as an example nor as an upload: Gradio would copy them to where visitors can load them."""
    folder, secret = tmp_path / "gradio", tmp_path / "secret.png"
    folder.mkdir()
    secret.write_bytes(png())
    environment = {**child_environment, "GRADIO_TEMP_DIR": str(folder), "LOGDIR": str(tmp_path / "logs")}
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    # Gradio takes the event for a file at this address, and does not check those within.
    example = {"path": "http://localhost", "index": 0, "value": {"text": "x", "files": [file]}}

    def try_both() -> None:
        with (
            web_server(service, environment) as address,
            httpx.Client(base_url=address, trust_env=False, timeout=60) as http,
        ):
            visitor = Visitor(http, "alpha")
            filling = (each for each in visitor.config["dependencies"] if "example_select" in str(each["targets"]))
            body = {"data": [], "event_data": example, "fn_index": next(filling)["id"], "session_hash": visitor.session}
            reply = http.post("/gradio_api/run/predict", json=body).raise_for_status()
            assert "What does this chart say?" in reply.text
            visitor._join("submit", {"message": {"text": "x", "files": [file]}, MODEL_BOX: "alpha"})
            with visitor.events() as events:
                assert not next(event for event in events if event["msg"] == "process_completed")["success"]

    with pytest.raises(AssertionError, match="InvalidPathError: Cannot move .*secret.png"):  # in the server's log
        try_both()
    assert service.requests == [] and list(folder.rglob(secret.name)) == []


def reached(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def test_every_start_order_ends_with_the_model_listed() -> None:
    """All six orders concurrently; a service that has not started refuses connections."""
    stacks = [start_order(order) for order in itertools.permutations(("controller", "worker", "web"))]
    for step in range(3):
        for stack in stacks:
            stack[step][1].start()
        time.sleep(0.5)  # the next part comes later: that is the matter of this test
    began = time.monotonic()
    with httpx.Client(trust_env=False, timeout=20) as client:
        for stack in stacks:
            web = dict(stack)["web"]
            models = until(lambda web=web: client.get(f"{web.url}/ready").json()["models"])
            assert models == [MODEL]
    assert time.monotonic() - began < 10
    for _, live in itertools.chain(*stacks):
        live.stop()


def start_order(order: tuple[str, ...]) -> list[tuple[str, Live]]:
    """A controller, a worker and a page with each other's addresses, not started."""
    from llava.serve.control.app import ControllerService, controller_routes, with_lifespan
    from llava.serve.control.worker_client import WorkerClient

    def controller(_: int) -> Any:
        registry = Registry("shortest_queue")
        core = ControllerService(registry, WorkerClient(registry, None), AddressRule())
        return RequestMiddleware(with_lifespan(controller_routes(core), core), Keys(), Limits(), core.metrics)

    lives = {"controller": Live(controller)}
    url = lives["controller"].url

    def worker(port: int) -> Any:
        made = make_worker(StubEngine())
        made.heartbeat = HeartBeat(url, f"http://127.0.0.1:{port}", made.status, None)  # its real intervals
        return make_worker_app(made, Keys(), Limits())

    def web(_: int) -> Any:
        services = server.build_services(server.WebArgs(controller_url=url, model_list_mode="reload"))

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await services.close()

        app = FastAPI(lifespan=lifespan)
        server.add_probes(app, services)
        return app

    lives |= {"worker": Live(worker), "web": Live(web)}
    return [(name, lives[name]) for name in order]
