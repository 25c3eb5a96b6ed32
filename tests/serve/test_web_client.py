"""The web page's side of the wire against a controller that misbehaves in every way: answers, stops and reasons."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from llava.errors import ConfigError
from llava.serve.common.protocol import ErrorType, ServeError
from llava.serve.web.answer import answer
from llava.serve.web.chat import Chat, Turn
from llava.serve.web.client import USER_AGENT, ServiceClient
from llava.serve.web.errors import SENTENCES, explain, from_frame, from_response
from llava.serve.web.models import LIFETIME, ModelCatalog
from llava.serve.web.services import Moderator
from tests.serve.fake_service import FakeService


@pytest.fixture
def service() -> Iterator[FakeService]:
    with FakeService().serving() as running:
        yield running


def with_client(service: FakeService | str, work: Callable[[ServiceClient], Awaitable[Any]], **settings: Any) -> Any:
    async def go() -> Any:
        client = ServiceClient(getattr(service, "url", service), **settings)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(go())


def ask(
    service: FakeService, text: str = "What?", *, stop_when: Callable[[Turn], bool] = lambda _: False, **settings: Any
) -> Turn:
    """Answer one turn, and stop it as soon as `stop_when` returns true."""
    chat = Chat([Turn(text, model="alpha")])

    async def work(client: ServiceClient) -> None:
        async for _ in answer(client, chat):
            if stop_when(chat.turns[-1]):
                chat.stop.set()

    with_client(service, work, **settings)
    assert not chat.turns[-1].running and chat.turns[-1].finish_reason
    return chat.turns[-1]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [[], ["delta"]])
def test_an_answer(service: FakeService, features: list[str]) -> None:
    service.statuses["alpha"] = {"model_names": ["alpha"], "speed": 1, "queue_length": 0, "features": features}
    turn = ask(service)
    assert (turn.answer, turn.note, turn.finish_reason) == ("A red circle.", "", "stop")
    assert service.headers[-1]["user-agent"] == USER_AGENT == "InternVL-Chat Client"


def test_the_answer_grows_while_it_is_streamed(service: FakeService) -> None:
    service.delay = 0.2
    chat, seen = Chat([Turn("What?", model="alpha")]), []

    async def work(client: ServiceClient) -> None:
        async for _ in answer(client, chat):
            seen.append(chat.turns[-1].answer)

    with_client(service, work)
    assert {"A", "A red", "A red circle."} <= set(seen)


def test_a_reached_limit_is_said(service: FakeService) -> None:
    service.answers["alpha"] = [{"text": "x", "error_code": 0, "finish_reason": "length"}]
    assert "limit of output tokens" in ask(service).note


def test_no_frame_at_all_is_an_error(service: FakeService) -> None:
    service.answers["alpha"] = []
    turn = ask(service)
    assert turn.finish_reason == "error" and "empty answer" in turn.note


def test_stop_breaks_the_stream_off(service: FakeService) -> None:
    service.answers["alpha"], service.delay = ["word "] * 1000, 0.02
    turn = ask(service, stop_when=lambda turn: bool(turn.answer))
    assert turn.note == "Stopped." and turn.answer.startswith("word") and turn.finish_reason == "cancelled"
    until(lambda: service.broken_off == 1 and service.running == 0)


def test_stop_works_before_the_first_word(service: FakeService) -> None:
    service.silence = 30
    turn = ask(service, stop_when=lambda _: service.running == 1)
    assert turn.note == "Stopped." and turn.answer == ""
    until(lambda: service.broken_off == 1)


def test_a_closed_page_breaks_the_stream_off(service: FakeService) -> None:
    """Gradio closes a generator only where it yields, so it must also yield while a worker is silent."""
    service.silence = 30
    chat = Chat([Turn("What?", model="alpha")])

    async def work(client: ServiceClient) -> None:
        steps = answer(client, chat)
        await anext(steps)
        while not service.running:
            await anext(steps)
        await steps.aclose()  # type: ignore[attr-defined]

    with_client(service, work)
    until(lambda: service.broken_off == 1)
    assert not chat.turns[-1].running and chat.turns[-1].finish_reason == "cancelled"


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ErrorType), ids=lambda kind: kind.wire)
def test_every_error_has_its_own_sentence(kind: ErrorType, service: FakeService) -> None:
    service.answers["alpha"] = ["Well, ", ServeError(kind, "Details here.").frame("r-1")]
    turn = ask(service)
    assert turn.answer == "Well," and turn.finish_reason == "error"  # what came before the fault stays
    assert turn.note.startswith(SENTENCES[kind]) and kind.wire in turn.note and "request r-1" in turn.note
    assert "Details here." in turn.note
    assert ("high traffic" in turn.note) == (kind is ErrorType.OVERLOADED)


def test_the_sentences_differ() -> None:
    assert set(SENTENCES) == set(ErrorType) and len(set(SENTENCES.values())) == len(ErrorType)


@pytest.mark.parametrize(
    ("code", "kind"), [(1, ErrorType.INTERNAL), (2, ErrorType.NOT_FOUND), (3, ErrorType.WORKER_UNAVAILABLE)]
)
def test_an_old_worker_is_not_believed_about_high_traffic(code: int, kind: ErrorType, service: FakeService) -> None:
    text = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
    service.answers["alpha"] = [{"text": text, "error_code": code}]
    turn = ask(service)
    assert turn.note == f"{SENTENCES[kind]} (error_code: {code}, {kind.wire})"


def test_a_full_context_is_not_an_answer(service: FakeService) -> None:
    service.answers["alpha"] = [{"text": "prompt + notice", "error_code": 0, "finish_reason": "context_exceeded"}]
    turn = ask(service)
    assert turn.answer == "" and turn.note.startswith(SENTENCES[ErrorType.CONTEXT_TOO_LONG])


def test_nobody_serves_the_model(service: FakeService) -> None:
    service.models = []
    assert ask(service).note.startswith(SENTENCES[ErrorType.NOT_FOUND])


@pytest.mark.parametrize("status", [400, 401, 404, 413, 418, 422, 429, 500, 502, 503, 504])
def test_a_refusal_by_status(status: int, service: FakeService) -> None:
    service.http["/of/alpha/worker_generate_stream"] = (status, {"detail": "because"})
    turn = ask(service)
    assert f"HTTP status {status}: because" in turn.note
    kinds = [kind for kind in ErrorType if kind.status == status]
    assert not kinds or turn.note.startswith(SENTENCES[kinds[0]])


def test_a_refusal_that_is_a_frame(service: FakeService) -> None:
    frame = ServeError(ErrorType.OVERLOADED, "9 are waiting.").frame("r-2")
    service.http["/of/alpha/worker_generate_stream"] = (503, frame)
    assert ask(service).note.startswith(SENTENCES[ErrorType.OVERLOADED] + " (9 are waiting.)")


@pytest.mark.parametrize(
    "frames",
    [[b"not json\0"], [b"[1]\0"], [b"\xff\xfe\0"], [b"[" * 100_000 + b"\0"]],
    ids=["text", "list", "bytes", "deep"],
)
def test_nonsense_on_the_wire(frames: list[bytes], service: FakeService) -> None:
    service.answers["alpha"] = frames
    assert ask(service).note.startswith(SENTENCES[ErrorType.INTERNAL])


def test_a_worker_that_breaks_off(service: FakeService) -> None:
    service.answers["alpha"] = ["A ", "break"]
    turn = ask(service)
    assert turn.answer == "A" and turn.note.startswith(SENTENCES[ErrorType.WORKER_UNAVAILABLE])


def test_a_silent_worker(service: FakeService) -> None:
    service.silence = 30
    assert ask(service, idle_timeout=0.3).note.startswith(SENTENCES[ErrorType.TIMEOUT])


def test_a_worker_that_is_gone(service: FakeService, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        service.http["/get_worker_address"] = (200, {"address": f"http://127.0.0.1:{closed.getsockname()[1]}"})
        note = ask(service).note
    assert note.startswith(SENTENCES[ErrorType.WORKER_UNAVAILABLE]) and "cannot connect to" in note
    assert "127.0.0.1" not in note and "127.0.0.1" in caplog.text  # where it is, is for the operator


@pytest.mark.parametrize("reply", [{}, {"address": 3}, [], "x", None, {"address": "nonsense"}])
def test_a_controller_that_answers_nonsense(reply: object, service: FakeService) -> None:
    service.http["/get_worker_address"] = (200, reply)
    assert "error_code" in ask(service).note


def test_a_worker_that_does_not_describe_itself_is_used_all_the_same(
    service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.statuses["alpha"] = None
    with caplog.at_level(logging.WARNING):
        assert ask(service).answer == "A red circle."
    assert "returned no valid status" in caplog.text


def test_redirects_are_not_followed(service: FakeService) -> None:
    from starlette.responses import RedirectResponse

    service.http["/list_models"] = (307, RedirectResponse(f"{service.url}/elsewhere"))
    with pytest.raises(ServeError, match="HTTP status 307"):
        with_client(service, ServiceClient.models)
    assert "/elsewhere" not in service.calls


def test_the_token_goes_with_every_call(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_TOKEN", "s3cret")
    ask(service)
    assert len(service.headers) == 3
    assert {headers.get("authorization") for headers in service.headers} == {"Bearer s3cret"}


def test_an_address_without_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="http://"):
        ServiceClient("localhost:10000")


def test_odd_errors_are_explained() -> None:
    assert from_frame({"text": "x"}) is None
    for error in (
        from_frame({"error_code": 1, "error": "oops", "text": None}),
        from_frame({"error_code": "?", "error": {"type": 3}}),
        from_response(599, b""),
        from_response(500, b"\0\0{"),
    ):
        assert error is not None and explain(error)


# --- the list of models ---------------------------------------------------------------------------------------------


def listings(service: FakeService | str, *steps: Callable[[], None], mode: str = "reload") -> list[Any]:
    """The listing at first and after each step, each requested after the previous one has expired."""

    async def work(client: ServiceClient) -> list[Any]:
        catalog = ModelCatalog(client, mode=mode)
        found = [await catalog.listing(refresh=True)]
        for step in steps:
            step()
            catalog._fetched -= LIFETIME
            found.append(await catalog.listing())
        return found

    return with_client(service, work)


def test_the_list_is_sorted_and_follows(service: FakeService) -> None:
    service.models = ["b", "a"]
    first, second, third = listings(service, service.models.clear, lambda: service.models.append("c"))
    assert first.models == ("a", "b") and second.models == () and third.models == ("c",)
    assert service.calls.count("/refresh_all_workers") == 1


def test_once_keeps_the_first_list_that_is_not_empty(service: FakeService) -> None:
    service.models = []
    first, second, third = listings(service, lambda: service.models.append("c"), service.models.clear, mode="once")
    assert (first.models, second.models, third.models) == ((), ("c",), ("c",))


def test_many_pages_ask_once(service: FakeService) -> None:
    async def work(client: ServiceClient) -> None:
        catalog = ModelCatalog(client, mode="reload")
        await asyncio.gather(*(catalog.listing(refresh=True) for _ in range(20)))

    with_client(service, work)
    assert service.calls == ["/refresh_all_workers", "/list_models", "/list_workers"]


VIEW = {"models": [], "loading": [], "state": "ready", "queue_length": 0, "features": [], "info": None}


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (None, "No worker has registered"),
        ([], "No worker has registered"),
        ([{**VIEW, "state": "loading", "loading": ["vicuna"]}], "still loading vicuna;"),
        ([{**VIEW, "state": "loading", "loading": ["vicuna"], "progress": 45}], "still loading vicuna (45 %);"),
        ([{**VIEW, "state": "failed"}], "none is ready (state: failed)"),
    ],
)
def test_an_empty_list_says_why(workers: list[dict[str, object]] | None, words: str, service: FakeService) -> None:
    service.models, service.workers = [], workers
    (listing,) = listings(service)
    assert listing.models == () and words in listing.reason


def test_a_missing_controller_is_said_and_its_address_logged(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        (listing,) = listings(url)
    assert "cannot connect to the controller" in listing.reason
    assert url not in listing.reason and url in caplog.text


def test_the_default_model_comes_first(service: FakeService) -> None:
    service.models = ["a", "b"]

    async def work(client: ServiceClient) -> list[str | None]:
        catalogs = [ModelCatalog(client, default_model=name) for name in ("b", "absent", None)]
        return [catalog.preferred(await catalog.listing()) for catalog in catalogs]

    assert with_client(service, work) == ["b", "a", "a"]


# --- moderation -----------------------------------------------------------------------------------------------------


def refusal(reply: Callable[[httpx.Request], httpx.Response], text: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    async def go() -> str | None:
        moderator = Moderator(transport=httpx.MockTransport(reply))
        try:
            return await moderator.refusal(text)
        finally:
            await moderator.close()

    return asyncio.run(go())


@pytest.mark.parametrize("text", ['say "hi"', "tab\tand \\ back", "nul \0", "emoji 🖼", "line\nbreak", '"},"input":"x'])
def test_the_moderation_body_is_json_whatever_is_written(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"results": [{"flagged": False}]})

    assert refusal(reply, text, monkeypatch) is None
    assert json.loads(seen[0].content) == {"input": " ".join(text.split())}
    assert seen[0].headers["authorization"] == "Bearer k"


def test_moderation_refuses_what_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = httpx.Response(200, json={"results": [{"flagged": True}]})
    assert "not sent" in (refusal(lambda _: reply, "bad", monkeypatch) or "")


@pytest.mark.parametrize(
    "reply", [httpx.Response(500), httpx.Response(200, text="x"), httpx.Response(200, json={"results": []})]
)
def test_moderation_refuses_when_it_cannot_tell(reply: httpx.Response, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "could not check your message" in (refusal(lambda _: reply, "x", monkeypatch) or "")


def test_moderation_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow", request=request)

    assert "ReadTimeout" in (refusal(reply, "x", monkeypatch) or "")


def test_moderation_needs_its_key_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        Moderator()
