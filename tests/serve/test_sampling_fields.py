"""Sampling fields and structured output on the wire, from openai's client to the engine, and upstream of an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llava.engine import Engine, Request, SamplingParams
from llava.engine.arguments import EngineArgs
from llava.engine.sequence import GuidedDecodingParams
from llava.serve.worker.local_backend import BackendSettings, LocalBackend, model_loader
from tests.eval.fake_server import FakeServer
from tests.serve.stubs import (
    PATIENCE,
    LiveController,
    LiveWorker,
    StubEngine,
    decoy,
    frames_of,
    generate,
    http_reply,
    live_controller,
    live_worker,
    request_body,
    until,
)
from tests.serve.test_tools import adapter, upstream_reply

NAME = "tiny"
LONG = "A chat about images. " * 12 + "USER: What color is the shape? ASSISTANT:"
SETTINGS = BackendSettings(limit=6, queue_limit=6)


@pytest.fixture(scope="module")
def parts(tiny_dirs: dict[str, Path]) -> Iterator[tuple[LiveController, LiveWorker]]:
    args = EngineArgs(str(tiny_dirs["chat"]), device="cpu", max_batch_size=SETTINGS.limit)
    load = model_loader(args, NAME, None, SETTINGS)
    with (
        live_controller() as controller,
        live_worker(settings=SETTINGS, controller=controller.url, load=load, name=NAME) as worker,
    ):
        until(lambda: controller.registry.models() == [NAME])
        yield controller, worker


@pytest.fixture(scope="module")
def client(parts: tuple[LiveController, LiveWorker]) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False) as http:
        yield openai.OpenAI(base_url=f"{parts[0].url}/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def served(parts: tuple[LiveController, LiveWorker]) -> Engine:
    """The engine behind the worker."""
    backend = parts[1].worker.backend
    assert isinstance(backend, LocalBackend) and backend._loaded is not None
    assert isinstance(backend._loaded.engine, Engine)
    return backend._loaded.engine


def frames(url: str, **body: Any) -> list[dict[str, Any]]:
    return frames_of(generate(url, {"model": NAME, "prompt": LONG, "max_new_tokens": 8, **body}))


def by_choice(found: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {
        index: [one for one in found if one.get("index", 0) == index]
        for index in {one.get("index", 0) for one in found}
    }


# --- worker ---------------------------------------------------------------------------------------------------------


def test_a_request_without_the_new_fields_gets_the_published_frames(parts: tuple[LiveController, LiveWorker]) -> None:
    found = frames(parts[1].url, temperature=0)
    assert {key for frame in found for key in frame} == {"text", "error_code", "finish_reason", "usage"}


@pytest.mark.parametrize("mode", ["delta", "cumulative"])
def test_choices_have_their_own_seeds_and_share_a_prefill(
    parts: tuple[LiveController, LiveWorker], served: Engine, mode: str
) -> None:
    served.prefiller.prefix_cache.__init__(served.prefiller.prefix_cache.budget)  # type: ignore[misc]
    before = served.statistics()
    found = by_choice(frames(parts[1].url, n=3, seed=11, temperature=1.5, stream_mode=mode))
    after = served.statistics()
    assert sorted(found) == [0, 1, 2] and all(one[-1]["finish_reason"] in ("length", "stop") for one in found.values())
    prompt = found[0][-1]["usage"]["prompt_tokens"]
    assert prompt > 64 and after.computed_tokens - before.computed_tokens == prompt + 2  # the last token of each
    assert all(set(found[index][-1]["usage"]) == {"completion_tokens"} for index in (1, 2))
    for index, own in found.items():
        alone = frames(parts[1].url, seed=11 + index, temperature=1.5, stream_mode=mode)
        text, expected = (
            "".join(one["text"] for one in each) if mode == "delta" else each[-1]["text"] for each in (own, alone)
        )
        assert text == expected
    assert len({str([one["text"] for one in own]) for own in found.values()}) == 3


def test_log_probabilities_stream_with_their_text(parts: tuple[LiveController, LiveWorker], served: Engine) -> None:
    found = frames(parts[1].url, top_logprobs=2, temperature=1.0, seed=4, stream_mode="delta")
    tokens = [token for frame in found for token in frame.get("logprobs", ())]
    (answer,) = served.generate([Request(LONG, params=SamplingParams(8, 1.0, seed=4, logprobs=2))])
    assert answer.logprobs is not None and len(tokens) == len(answer.logprobs) > 3
    assert [token["logprob"] for token in tokens] == [one.logprob for one in answer.logprobs]
    joined = b"".join(bytes(token["bytes"]) for token in tokens).decode("utf-8", "replace")
    assert joined.strip() == "".join(frame["text"] for frame in found).strip() == answer.text
    for token, one in zip(tokens, answer.logprobs, strict=True):
        assert [top["logprob"] for top in token["top_logprobs"]] == [logprob for _, logprob in one.top]
        assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_json": {"type": "strange"}}, "The JSON schema cannot be used: Invalid type: strange"),
        ({"guided_regex": "["}, "The regular expression cannot be used"),
        ({"logit_bias": {"500": 1}}, "Token ids of logit_bias must be in [0, 383], got 500"),
        ({"n": 13}, "The request has 13 choices, and this worker takes 12 at a time; lower n."),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_served_is_refused(
    parts: tuple[LiveController, LiveWorker], fields: dict[str, Any], words: str
) -> None:
    reply = generate(parts[1].url, {"model": NAME, "prompt": "x", **fields})
    (frame,) = frames_of(reply)
    assert (reply.status_code, frame["error"]["type"]) == (400, "bad_request") and words in frame["text"]
    until(lambda: parts[1].in_use == 0)


def test_choices_take_a_slot_each_and_free_it() -> None:
    engine = StubEngine(batch=2)
    with live_worker(engine, BackendSettings(limit=2, queue_limit=2)) as worker:
        engine.gate.clear()
        url = f"{worker.url}/worker_generate_stream"
        with httpx.stream("POST", url, json=request_body(tokens=1000, n=3), timeout=PATIENCE, trust_env=False) as reply:
            assert reply.status_code == 200
            until(lambda: worker.in_use == 3)
            assert generate(worker.url, request_body(n=2)).status_code == 503
        engine.gate.set()
        until(lambda: worker.in_use == 0)
        assert {job.handle.completion.finish_reason for job in engine.history if job.handle.completion} == {"cancelled"}


# --- openai's client ------------------------------------------------------------------------------------------------

ASK: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "What color?"}], "max_tokens": 24}
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True}}


def test_openai_gets_choices_and_log_probabilities_whole_and_streamed(client: openai.OpenAI) -> None:
    fields = {
        **ASK,
        "n": 2,
        "seed": 5,
        "temperature": 1.2,
        "logprobs": True,
        "top_logprobs": 2,
        "presence_penalty": 0.5,
    }
    whole = client.chat.completions.create(**fields)
    texts, tokens, reasons = {0: "", 1: ""}, {0: [], 1: []}, {}  # type: ignore[var-annotated]
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert chunk.usage == whole.usage and whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert len({choice.message.content for choice in whole.choices}) == 2
    for choice in whole.choices:
        assert choice.message.content == texts[choice.index] and choice.finish_reason == reasons[choice.index]
        found = (choice.logprobs and choice.logprobs.content) or []
        assert [token.bytes for token in found] == [token.bytes for token in tokens[choice.index]]
        streamed = [token.logprob for token in tokens[choice.index]]
        assert [token.logprob for token in found] == pytest.approx(streamed, abs=1e-4)  # another batch
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens[choice.index])
        joined = "".join(token.token for token in tokens[choice.index]).strip()
        assert joined == choice.message.content or "�" in joined
    plain = client.chat.completions.create(**{**ASK, "max_tokens": 2})
    assert plain.choices[0].logprobs is None


def test_openai_gets_structured_answers(client: openai.OpenAI) -> None:
    for seed in range(6):
        ask = {**ASK, "seed": seed, "max_tokens": 200}
        shape = json.loads(
            client.chat.completions.create(response_format=FORMAT, **ask).choices[0].message.content or ""
        )
        assert shape["color"] in ("red", "blue") and 0 <= shape["count"] <= 9
        guided = client.chat.completions.create(extra_body={"guided_choice": ["yes", "no"]}, **ask)
        assert guided.choices[0].message.content in ("yes", "no") and guided.choices[0].finish_reason == "stop"
        matched = client.chat.completions.create(
            extra_body={"guided_regex": r"\d{2}/[a-c]+"}, **{**ask, "max_tokens": 40}
        )
        found = matched.choices[0]
        assert re.fullmatch(r"\d{2}/[a-c]+", found.message.content or "") or found.finish_reason == "length"
    cut = client.chat.completions.create(response_format=FORMAT, **{**ASK, "max_tokens": 3})
    assert cut.choices[0].finish_reason == "length"


def test_openai_gets_any_json_object(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        response_format={"type": "json_object"}, logit_bias={"128": 5}, seed=3, **{**ASK, "max_tokens": 600}
    )
    choice = whole.choices[0]
    assert (choice.message.content or "").startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}},
            "JSON schema",
        ),
        ({"extra_body": {"guided_regex": "("}}, "regular expression cannot be used"),
        ({"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}}, "guided_regex excludes guided_choice"),
        ({"n": 17}, "n: Input should be less than or equal to 16"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
    ],
    ids=str,
)
def test_openai_is_told_what_is_wrong(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        client.chat.completions.create(**ASK, **fields)


def test_penalties_of_the_api_reach_the_tokens(client: openai.OpenAI, served: Engine) -> None:
    fields = {"frequency_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {"330": 4.0}}
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3}
    whole = client.chat.completions.create(seed=9, temperature=1.1, extra_body=extra, **fields, **ASK)
    from llava.serve.common.openai_chat import ChatMessage, render_chat

    rendered = render_chat([ChatMessage.model_validate(message) for message in ASK["messages"]], "v1")
    stop = tuple(rendered.stop)
    params = SamplingParams(24, 1.1, seed=9, stop=stop, **{**fields, "logit_bias": {330: 4.0}}, **extra)
    expected, plain = served.generate(
        [Request(rendered.prompt, params=one) for one in (params, SamplingParams(24, 1.1, seed=9, stop=stop))]
    )
    assert whole.choices[0].message.content == expected.text != plain.text


# --- adapter --------------------------------------------------------------------------------------------------------

ASKED = "USER: Name two colors. ASSISTANT:"
MODELS = http_reply(json.dumps({"data": [{"id": "big"}]}).encode())


def test_an_adapter_passes_the_fields_on() -> None:
    """To the controller's own API, and from there to a worker."""
    fields = {"top_k": 4, "min_p": 0.2, "frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5}
    with live_controller() as controller, live_worker(controller=controller.url) as worker:
        until(lambda: controller.registry.models() == ["stub"])
        with adapter(f"{controller.url}/v1") as (url, _):
            for guide, expected in (
                ({"guided_json": SCHEMA}, GuidedDecodingParams(json=SCHEMA)),
                ({"response_format": FORMAT}, GuidedDecodingParams(json=SCHEMA)),
                ({"response_format": {"type": "json_object"}}, GuidedDecodingParams(json={"type": "object"})),
                ({"guided_regex": "a+"}, GuidedDecodingParams(regex="a+")),
                ({"guided_choice": ["a", "b"]}, GuidedDecodingParams(choice=["a", "b"])),
            ):
                body = request_body(ASKED, 2, logit_bias={"5": -3}, seed=3, **fields, **guide)
                assert frames_of(generate(url, body))[-1]["finish_reason"] == "length"
                params = worker.engine.history[-1].request.params
                assert {name: getattr(params, name) for name in fields} == fields
                assert (params.logit_bias, params.seed, params.guided_decoding) == ({5: -3.0}, 3, expected)
            found = by_choice(frames_of(generate(url, request_body(ASKED, 2, n=2, seed=3, stream_mode="delta"))))
            assert ["".join(one["text"] for one in found[index]) for index in (0, 1)] == ["w0 w1 "] * 2
            assert [job.request.params.seed for job in worker.engine.history[-2:]] == [3, 4]


@pytest.mark.parametrize(("kind", "value"), [("regex", "a+"), ("choice", ["a", "b"])])
def test_an_adapter_asks_old_and_new_versions_of_vllm(kind: str, value: object) -> None:
    engine = FakeServer()
    with adapter(engine.url) as (url, _):
        assert frames_of(generate(url, request_body(ASKED, **{f"guided_{kind}": value})))[-1]["finish_reason"] == "stop"
    engine.close()
    assert engine.bodies[0]["structured_outputs"] == {kind: value} and engine.bodies[0][f"guided_{kind}"] == value


def chunk(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    token = {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}
    logprobs = {"content": [token]} if text else None
    return {"choices": [{"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": reason}]}


def test_an_adapter_passes_choices_and_log_probabilities_on() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}
    parts = [chunk(1, "b"), chunk(0, "a"), chunk(1, "d"), chunk(0, "c"), chunk(0, "", "stop"), chunk(1, "", "length")]
    with decoy(MODELS) as engine, adapter(f"{engine.url}/v1") as (url, worker):
        engine.reply = upstream_reply(*parts, usage, "[DONE]")
        found = by_choice(frames_of(generate(url, request_body(ASKED, n=2, top_logprobs=0, stream_mode="delta"))))
        for index, (text, reason) in enumerate((("ac", "stop"), ("bd", "length"))):
            assert "".join(frame["text"] for frame in found[index]) == text
            assert found[index][-1]["finish_reason"] == reason
            tokens = [token for frame in found[index] for token in frame.get("logprobs", ())]
            assert [token["token"] for token in tokens] == list(text) and tokens[0]["logprob"] == -0.5
        assert [found[index][-1]["usage"] for index in (0, 1)] == [{"prompt_tokens": 7, "completion_tokens": 4}, {}]
        until(lambda: worker.backend.in_use == 0)


@pytest.mark.parametrize(
    ("fields", "words"), [({"n": 2}, "it has no choice 1"), ({"top_logprobs": 1}, "it has no log probabilities")]
)
def test_an_engine_that_ignores_a_field_is_not_believed(fields: dict[str, Any], words: str) -> None:
    plain = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
    with decoy(MODELS) as engine, adapter(f"{engine.url}/v1") as (url, _):
        engine.reply = upstream_reply(plain, "[DONE]")
        assert words in frames_of(generate(url, request_body(ASKED, **fields)))[-1]["text"]
