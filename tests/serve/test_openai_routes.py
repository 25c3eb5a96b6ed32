"""Every route of the OpenAI-compatible API through the `openai` client, on a stub engine: objects, events, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import openai
import pytest

from llava.serve.common.middleware import Limits
from llava.serve.common.protocol import ErrorType, ServeError, WorkerStatus
from llava.serve.common.streaming import merged
from llava.serve.control.answers import Answer, ChatReply, Piece, Shown
from llava.serve.worker.local_backend import BackendSettings
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    TLS,
    LiveController,
    LiveWorker,
    StubEngine,
    b64,
    decoy,
    http_reply,
    live_controller,
    live_worker,
    png,
    post,
    until,
)

IMAGE = "data:image/png;base64," + b64(png())
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": "hi", "max_output_tokens": 2},
}


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    http = httpx.Client(trust_env=False, verify=TLS)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, http_client=http)


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[LiveController, LiveWorker]]:
    with live_controller() as controller, live_worker(StubEngine(context=500), controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        yield controller, worker


@pytest.fixture(scope="module")
def client(parts: tuple[LiveController, LiveWorker]) -> Iterator[openai.OpenAI]:
    with client_of(parts[0].url) as api:
        yield api


# --- /v1/completions ------------------------------------------------------------------------------------------------


def test_a_completion_continues_the_text_as_it_is(
    client: openai.OpenAI, parts: tuple[LiveController, LiveWorker]
) -> None:
    done = client.completions.create(model=MODEL, prompt="once <image> </s>", max_tokens=3, stop="zzz", user="u")
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == ("w0 w1 w2 ", "length", 0, None)
    assert done.object == "text_completion" and done.id.startswith("cmpl-")
    assert done.usage is not None and (done.usage.prompt_tokens, done.usage.completion_tokens) == (17, 3)
    request = parts[1].engine.history[-1].request
    assert request.prompt == "once <image> </s>" and request.images == []
    assert request.params.stop == ("zzz",)  # no separator of a template
    assert [client.completions.create(model=MODEL, prompt="x").usage.completion_tokens] == [16]


def test_completions_of_several_prompts_stream_side_by_side(
    client: openai.OpenAI, parts: tuple[LiveController, LiveWorker]
) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": ["one", "three"], "max_tokens": 3, "echo": True}
    whole = client.completions.create(**options)
    assert [(c.index, c.text) for c in whole.choices] == [(0, "onew0 w1 w2 "), (1, "threew0 w1 w2 ")]
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 6)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "onew0 w1 w2 ", 1: "threew0 w1 w2 "}
    assert [c.index for chunk in chunks for c in chunk.choices if c.finish_reason == "length"] in ([0, 1], [1, 0])
    assert chunks[-1].usage == whole.usage
    until(lambda: parts[1].in_use == 0)


def test_prompts_may_be_token_ids(client: openai.OpenAI, parts: tuple[LiveController, LiveWorker]) -> None:
    client.completions.create(model=MODEL, prompt=[7, 8, 9], max_tokens=1)
    assert parts[1].engine.history[-1].request.prompt == [7, 8, 9]
    client.completions.create(model=MODEL, prompt=[[7], [8, 9]], max_tokens=1)
    assert [job.request.prompt for job in parts[1].engine.history[-2:]] == [[7], [8, 9]]
    with pytest.raises(openai.BadRequestError, match="at least 100000 tokens long") as too_long:  # not by the engine
        client.completions.create(model=MODEL, prompt=[7] * 100_000)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "cannot fill in"),
        ({"best_of": 3}, "best_of", "omit it"),
        ({"echo": True, "logprobs": 1}, "logprobs", "with echo"),
        ({"prompt": ["x"] * 33}, "prompt", "at most 32"),
        ({"prompt": []}, "prompt", "at least 1|greater than or equal to 0"),
        ({"prompt": [[-200]]}, "prompt", "at least 1|greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"prompt": ["x"] * 20, "n": 2}, "prompt", "at most 32"),
    ],
    ids=str,
)
def test_what_completions_do_not_serve_is_refused_by_name(
    client: openai.OpenAI, extra: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.completions.create(**{"model": MODEL, "prompt": "x", **extra})
    assert refused.value.param == param


# --- /v1/responses --------------------------------------------------------------------------------------------------

MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What?"}]}
PICTURED = {**MESSAGE, "content": [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}, *MESSAGE["content"]]}


def test_a_response_is_a_chat(client: openai.OpenAI, parts: tuple[LiveController, LiveWorker]) -> None:
    done = client.responses.create(
        model=MODEL,
        instructions="Be brief.",
        input=[PICTURED],
        max_output_tokens=2,
        temperature=0.5,
        store=True,
        metadata={"a": "b"},
        user="u",
        tools=[],
        truncation="disabled",
    )
    assert done.output_text == "w0 w1 " and done.output[0].id.startswith("msg_")
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert done.store is False and done.metadata == {"a": "b"} and done.user == "u"
    assert (done.instructions, done.temperature, done.max_output_tokens) == ("Be brief.", 0.5, 2)
    assert done.usage is not None and done.usage.output_tokens == 2
    assert done.usage.total_tokens == done.usage.input_tokens + 2
    request = parts[1].engine.history[-1].request
    assert str(request.prompt) == "Be brief. USER: <image>\nWhat? ASSISTANT:"
    assert len(request.images) == 1 and request.params.stop == ("</s>",)
    follow_up = [MESSAGE, *(item.model_dump() for item in done.output), {"role": "user", "content": "Why?"}]
    client.responses.create(model=MODEL, input=follow_up, max_output_tokens=1)
    assert str(parts[1].engine.history[-1].request.prompt).endswith(
        "USER: What? ASSISTANT: w0 w1 </s>USER: Why? ASSISTANT:"
    )


def test_a_response_streams_typed_events(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=[PICTURED], max_output_tokens=3) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    start = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*start, *["output_text.delta"] * 3, *end]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "w0 w1 w2 "
    final = events[-1].response
    assert final.output_text == "w0 w1 w2 " and final.usage.output_tokens == 3
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}


def test_a_complete_response_is_completed(parts: tuple[LiveController, LiveWorker]) -> None:
    chunk = b'{"text": "yes", "error_code": 0, "finish_reason": "stop", "usage": {"prompt_tokens": 3}}\0'
    with live_controller() as controller, decoy(http_reply(chunk)) as worker, client_of(controller.url) as api:
        controller.registry.put(worker.url, True, parts[1].worker.status(), probed=True)
        assert api.responses.create(model=MODEL, input="x").status == "completed"
        with api.responses.stream(model=MODEL, input="x") as stream:
            assert stream.get_final_response().output_text == "yes"


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "omit it"),
        ({"truncation": "auto"}, "truncation", "omit it"),
        ({"tools": [{"type": "web_search"}]}, "tools", "omit it"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "omit it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input", "should be 'message'"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "begin and end with a user message"),
        ({"n": 2}, "n", "less than or equal to 1"),
    ],
    ids=str,
)
def test_what_responses_do_not_serve_is_refused_by_name(
    client: openai.OpenAI, extra: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.post("/responses", body={"model": MODEL, "input": "x", **extra}, cast_to=object)
    assert refused.value.param == param


# --- errors and guards of every route -------------------------------------------------------------------------------


def ask(client: openai.OpenAI, route: str, **extra: Any) -> Any:
    return client.post(route.removeprefix("/v1"), body={**MINIMAL[route], **extra}, cast_to=object)


@pytest.mark.parametrize("route", ROUTES)
def test_errors_are_the_exceptions_of_the_client(route: str, client: openai.OpenAI) -> None:
    long = "x" * 600
    given, value = {
        "/v1/completions": ("prompt", long),
        "/v1/responses": ("input", long),
        "/v1/chat/completions": ("messages", [{"role": "user", "content": long}]),
    }[route]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 500 tokens") as too_long:
        ask(client, route, **{given: value})
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", given)
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, route, model="none")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, route, top_p=7)
    assert wrong.value.param == "top_p"


@pytest.mark.parametrize("route", ROUTES)
def test_a_schema_that_is_nested_too_deeply_is_refused(route: str, client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "array"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    fields: dict[str, dict[str, Any]] = {
        "/v1/completions": {"guided_json": schema},
        "/v1/responses": {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}},
        "/v1/chat/completions": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        },
    }
    with pytest.raises(openai.BadRequestError, match="nested more than 100 levels deep"):
        ask(client, route, **fields[route])


@pytest.mark.parametrize("route", [*ROUTES, "/tokenize", "/detokenize"])
def test_every_route_checks_the_key_and_the_rate(route: str) -> None:
    body = MINIMAL.get(route, {"model": "none", "prompt": "x"} if route == "/tokenize" else {"tokens": [1]})
    body = {**body, "model": "none"}
    with live_controller(api_keys=["right"], rate_limit=1) as controller, client_of(controller.url, "wrong") as api:
        if route.startswith("/v1"):
            with pytest.raises(openai.AuthenticationError) as denied:
                ask(api, route)
            assert denied.value.code == "invalid_api_key"
        replies = [post(controller.url, route, body, headers={"Authorization": f"Bearer {key}"}) for key in "wr"]
        assert [reply.json()["error"]["code"] for reply in replies] == ["invalid_api_key"] * 2
        right = {"Authorization": "Bearer right"}
        replies = [post(controller.url, route, body, headers=right) for _ in range(2)]
        assert [reply.json()["error"]["code"] for reply in replies] == ["model_not_found", "rate_limit_exceeded"]
        assert int(replies[1].headers["Retry-After"]) > 0
        until(lambda: controller.metric("llava_http_total", path=route, status="429") == 1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_any_route_stops_its_answers(route: str, stream: bool) -> None:
    engine = StubEngine(pause=0.005)
    endless = {"max_tokens": 10**6, "stream": stream}
    if route == "/v1/responses":
        endless["max_output_tokens"] = endless.pop("max_tokens")
    count = 2 if route == "/v1/completions" else 1
    body = {**MINIMAL[route], **endless, **({"prompt": ["a", "b"]} if count == 2 else {})}
    with live_controller() as controller, live_worker(engine, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        with httpx.Client(trust_env=False, verify=TLS, timeout=PATIENCE) as http:
            if stream:
                with http.stream("POST", controller.url + route, json=body) as reply:
                    next(reply.iter_raw())
                    until(lambda: engine.running == count)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post(controller.url + route, json=body, timeout=0.3)
        until(lambda: worker.in_use == 0 and controller.controller.streams == 0)
        until(lambda: controller.metric("llava_requests_total", outcome="cancelled") == count)


@pytest.mark.parametrize("route", ROUTES)
def test_a_failure_within_a_stream_is_typed(route: str, parts: tuple[LiveController, LiveWorker]) -> None:
    controller, worker = parts
    worker.engine.step_error = RuntimeError("secret")
    with client_of(controller.url) as api:
        resources: list[Any] = [api.chat.completions, api.completions, api.responses]
        stream = resources[ROUTES.index(route)].create(**MINIMAL[route], stream=True)
        with pytest.raises(openai.APIError) as failed:
            list(stream)
    assert failed.value.code == "internal" and "secret" not in str(failed.value.body)
    worker.engine.step_error = RuntimeError("secret")
    with client_of(controller.url) as api, pytest.raises(openai.InternalServerError) as whole:
        ask(api, route)
    assert whole.value.code == "internal"
    until(lambda: worker.in_use == 0)


def test_a_failed_response_says_so_in_its_last_event(parts: tuple[LiveController, LiveWorker]) -> None:
    parts[1].engine.step_error = RuntimeError("secret")
    text = post(parts[0].url, "/v1/responses", {**MINIMAL["/v1/responses"], "stream": True}).text
    last = text.strip().split("\n\n")[-1].split("\n")
    event = json.loads(last[1].removeprefix("data: "))
    assert last[0] == "event: response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize("route", ROUTES)
def test_a_controller_that_drains_refuses_every_route(route: str, parts: tuple[LiveController, LiveWorker]) -> None:
    parts[0].controller.draining = True
    try:
        reply = post(parts[0].url, route, MINIMAL[route])
    finally:
        parts[0].controller.draining = False
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert reply.headers["Retry-After"] == "2"


def test_a_refused_prompt_closes_the_others() -> None:
    settings = BackendSettings(limit=1, queue_limit=0)
    with live_controller() as controller, live_worker(StubEngine(), settings, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        worker.engine.gate.clear()
        reply = post(controller.url, "/v1/completions", {"model": MODEL, "prompt": ["a", "b"]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
        worker.engine.gate.set()
        until(lambda: worker.in_use == 0 and controller.controller.streams == 0)


def test_other_workers_are_asked_only_for_what_they_offer() -> None:
    """A worker without features, as other projects have them: no completions, no tokenizer, no new sampling fields."""
    reply = b'{"text": "hello", "error_code": 0}\0'
    with live_controller() as controller, decoy(http_reply(reply)) as worker, client_of(controller.url) as api:
        body = {"worker_name": worker.url, "check_heart_beat": True, "worker_status": {"model_names": [MODEL]}}
        status = {"model_names": [MODEL], "speed": 1, "queue_length": 0}
        assert post(controller.url, "/register_worker", {**body, "worker_status": status}).status_code == 200
        controller.registry.entries()[0].probed = True
        assert api.responses.create(model=MODEL, input="x").output_text == "hello"
        with pytest.raises(openai.BadRequestError, match="has no text completions; use /v1/chat/completions"):
            api.completions.create(model=MODEL, prompt="x")
        with pytest.raises(openai.BadRequestError, match="does not support top_k; omit it") as refused:
            ask(api, "/v1/chat/completions", top_k=3)
        assert refused.value.param == "top_k"
        for path, content in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            assert (
                "has no tokenizer" in post(controller.url, path, {"model": MODEL, **content}).json()["error"]["message"]
            )


def token(text: str, logprob: float, **more: Any) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), **more}


def frames(*contents: dict[str, Any]) -> bytes:
    return b"".join(json.dumps({"text": "", "error_code": 0, **content}).encode() + b"\0" for content in contents)


@contextlib.contextmanager
def scripted(reply: bytes) -> Iterator[openai.OpenAI]:
    """A client of a controller whose only worker always sends `reply`."""
    with live_controller() as controller, decoy(http_reply(reply)) as worker, client_of(controller.url) as api:
        features = ["completions", "delta", "sampling"]
        status = WorkerStatus(model_names=[MODEL], speed=1, queue_length=0, features=features)
        controller.registry.put(worker.url, True, status, probed=True)
        yield api


TOPS = {"top_logprobs": [token("ab", -0.5), token("x", -math.inf)]}
TWO = frames(
    {"text": "ab", "index": 0, "logprobs": [token("ab", -0.5, **TOPS)]},
    {"text": "q", "index": 1, "logprobs": [token("q", -2.0)]},
    {"text": "c", "index": 0, "logprobs": [token("c", -1.0)], "finish_reason": "stop", "usage": {"prompt_tokens": 5}},
    {"index": 1, "finish_reason": "length", "usage": {"completion_tokens": 1}},
)


def test_choices_and_log_probabilities_have_the_form_of_their_route() -> None:
    with scripted(TWO) as api:
        done = api.completions.create(model=MODEL, prompt="x", n=2, logprobs=2)
        chunks = list(api.completions.create(model=MODEL, prompt="x", n=2, logprobs=2, stream=True))
        chat = api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], n=2, logprobs=True, top_logprobs=2
        )
        plain = api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], n=2)
    assert [(c.text, c.finish_reason) for c in done.choices] == [("abc", "stop"), ("q", "length")]
    first = done.choices[0].logprobs
    assert first is not None and (first.tokens, first.token_logprobs, first.text_offset) == (
        ["ab", "c"],
        [-0.5, -1.0],
        [0, 2],
    )
    assert first.top_logprobs == [{"ab": -0.5, "x": -9999.0}, {"c": -1.0}]
    parts = [c.logprobs for chunk in chunks for c in chunk.choices if c.index == 0 and c.logprobs]
    assert [part.text_offset for part in parts] == [[0], [2]]
    assert done.usage is not None and (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 1)
    content = chat.choices[0].logprobs.content
    assert content is not None and [(each.token, each.logprob, each.bytes) for each in content] == [
        ("ab", -0.5, [97, 98]),
        ("c", -1.0, [99]),
    ]
    assert [top.token for top in content[0].top_logprobs] == ["ab", "x"]
    assert [choice.logprobs for choice in plain.choices] == [None, None]
    one = frames({"text": "ab", "logprobs": [token("ab", -0.5, **TOPS)]}, {"finish_reason": "stop"})
    with scripted(one) as api:
        asked: dict[str, Any] = {"model": MODEL, "input": "x", "include": ["message.output_text.logprobs"]}
        response = api.responses.create(**asked)
        events = list(api.responses.create(**asked, stream=True))
    assert response.output[0].content[0].logprobs[0].token == "ab"
    assert next(e for e in events if e.type == "response.output_text.delta").logprobs[0].logprob == -0.5


def test_offsets_count_a_character_of_several_tokens_once() -> None:
    halves = [{"token": "\ufffd", "logprob": -1.0, "bytes": [byte]} for byte in "é".encode()]
    with scripted(frames({"text": "éb", "logprobs": [*halves, token("b", -1.0)], "finish_reason": "stop"})) as api:
        (choice,) = api.completions.create(model=MODEL, prompt="x", logprobs=0).choices
    assert choice.logprobs is not None and choice.logprobs.text_offset == [0, 1, 1]


def test_no_log_probability_is_lost_to_another_of_the_same_text() -> None:
    def part(value: float, *data: int, **more: Any) -> dict[str, Any]:
        return {"token": bytes(data).decode(errors="replace"), "logprob": value, "bytes": list(data), **more}

    spaces = [part(-0.1, 32), part(-0.2, 32), part(-0.3, 32)]  # "▁", "<0x20>" and an added token
    halves = [part(-0.1, 195), part(-0.2, 32, 226, 128), part(-0.3, 92)]
    sent = [part(-0.2, 32, top_logprobs=spaces), part(-3.0, 196, top_logprobs=halves)]
    with scripted(frames({"text": " x", "logprobs": sent, "finish_reason": "stop"})) as api:
        found = api.completions.create(model=MODEL, prompt="x", logprobs=3).choices[0].logprobs
    assert found is not None and found.tokens == [" ", "bytes:\\xc4"]
    assert found.top_logprobs == [
        {" #2": -0.1, " ": -0.2, " #3": -0.3},  # the generated token has its own text
        {"bytes:\\xc3": -0.1, "bytes: \\xe2\\x80": -0.2, "\\": -0.3, "bytes:\\xc4": -3.0},
    ]


def test_a_stream_of_choices_keeps_nothing_it_has_sent() -> None:
    answer: Any = Answer("", None)  # type: ignore[arg-type]
    (choice,) = answer.choices
    choice.texts, choice.logprobs = ["a"], [token("a", -1.0)]
    reply = ChatReply(MODEL, "1", [answer], shown=Shown(False, True))
    (chunk,) = reply.piece(Piece(choice, "a", [token("a", -1.0)]))  # type: ignore[list-item]
    assert chunk["choices"][0]["delta"] == {"content": "a"} and (choice.text, choice.logprobs) == ("", [])  # type: ignore[index]


@pytest.mark.parametrize(
    "bad",
    [
        frames({"text": "a", "index": 0, "finish_reason": "stop"}),  # nothing of the second choice
        frames({"text": "a", "index": 2}),
        frames({"text": "a", "index": 0, "logprobs": [token("a", math.nan)]}),
        frames({"text": "a", "index": 0, "logprobs": [7]}),
    ],
    ids=["missing choice", "index", "nan", "number"],
)
def test_malformed_choices_of_a_worker_are_an_error(bad: bytes) -> None:
    with scripted(bad) as api, pytest.raises(openai.InternalServerError) as failed:
        api.completions.create(model=MODEL, prompt="x", n=2)
    assert (failed.value.status_code, failed.value.code) == (502, "worker_unavailable")


def test_streams_that_are_read_together_end_together() -> None:
    ended = []

    async def silent() -> AsyncGenerator[int, None]:
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            ended.append("silent")

    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ServeError(ErrorType.TIMEOUT, "no answer")

    async def scene() -> list[int]:
        return [item async for item in merged([silent(), failing()])]

    with pytest.raises(ServeError):
        asyncio.run(scene())
    assert ended == ["silent"]


# --- unknown routes and models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/responses/resp_1", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("GET", "/tokenize", 405, "method_not_supported"),
    ],
)
def test_an_unknown_route_is_told_the_known_ones(
    method: str, path: str, status: int, code: str, parts: tuple[LiveController, LiveWorker]
) -> None:
    reply = httpx.request(method, parts[0].url + path, trust_env=False, verify=TLS)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    for route in [*ROUTES, "/tokenize", "/detokenize"]:
        assert f"POST {route}" in error["message"]
    assert "GET /v1/models, GET /v1/models/{name}" in error["message"] and "embeddings" not in error["message"]


def test_a_body_that_the_controller_takes_is_taken_by_the_worker() -> None:
    """Longer than the routes without prompts take, and much longer with ASCII escapes."""
    limits = Limits(max_body=100_000, max_small_body=1000)
    with live_controller(limits=limits) as controller, live_worker(controller=controller.url, limits=limits):
        until(lambda: controller.registry.models() == [MODEL])
        body = json.dumps({"model": MODEL, "prompt": "日" * 30_000, "max_tokens": 1}, ensure_ascii=False).encode()
        typed = {"Content-Type": "application/json"}
        reply = httpx.post(f"{controller.url}/v1/completions", content=body, headers=typed, trust_env=False)
        assert reply.json()["usage"]["prompt_tokens"] == 30_000
        for path, asked in (("/tokenize", {"prompt": "x" * 90_000}), ("/detokenize", {"tokens": [7] * 9000})):
            reply = post(controller.url, path, asked)
            assert "has no tokenizer" in reply.json()["error"]["message"]  # of the stub, not the size


def test_a_worker_says_who_serves_the_api(parts: tuple[LiveController, LiveWorker]) -> None:
    reply = post(parts[1].url, "/v1/chat/completions", {})
    assert reply.status_code == 404 and "the controller serves the API" in reply.json()["error"]["message"]


def test_models_tell_their_context(client: openai.OpenAI, parts: tuple[LiveController, LiveWorker]) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(MODEL) == model and model.max_model_len == 100_000
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("none")
    assert unknown.value.code == "model_not_found"
