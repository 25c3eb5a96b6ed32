"""Requests of chat programs: recorded from Open WebUI 0.12.4, and as LibreChat documents them; texts are shortened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.engine.arguments import EngineArgs
from llava.serve.worker.local_backend import BackendSettings, model_loader
from tests.serve.stubs import b64, get, live_controller, live_worker, png, post, until

NAME = "tiny"
SETTINGS = BackendSettings(max_new_tokens=16)
CHAT = "/v1/chat/completions"
IMAGE = {"url": f"data:image/png;base64,{b64(png())}"}
ASKED = {"role": "user", "content": "What color is the sky?"}
TURNS = [ASKED, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Why?"}]
FILES = '<attached_files>\n<file type="file" id="d86e79f4" name="red.png"/>\n</attached_files>\n\nWhat color is it?'
TASK = {
    "role": "user",
    "content": '### Task:\nWrite a title as JSON: { "title": "…" }\n<chat_history>\nUSER: Hi\n</chat_history>',
}
OPEN_WEBUI: dict[str, tuple[str, dict[str, Any]]] = {
    "page": (
        CHAT,
        {
            "stream": True,
            "messages": [ASKED],
            "tools": [  # of 36, sent with every message unless "Builtin Tools" is switched off for the model
                {
                    "type": "function",
                    "function": {
                        "name": "get_current_timestamp",
                        "description": "Get the time.",
                        "parameters": {"properties": {}, "type": "object"},
                    },
                }
            ],
        },
    ),
    "page, image": (
        CHAT,
        {
            "stream": True,
            "messages": [
                ASKED,
                {
                    "role": "user",
                    "content": [{"type": "text", "text": FILES}, {"type": "image_url", "image_url": IMAGE}],
                },
            ],
        },
    ),
    "parameters": (
        CHAT,
        {"stream": True, "messages": TURNS, "temperature": 0.3, "max_tokens": 8, "stop": ["zzz"], "seed": 3},
    ),
    "system prompt": (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}),
    "title": (CHAT, {"messages": [TASK], "stream": False, "max_tokens": 1000}),
    "tags, follow-ups, queries, merge": (CHAT, {"messages": [TASK], "stream": False}),
    "emoji": (CHAT, {"messages": [TASK], "stream": False, "max_tokens": 4}),
    "responses": ("/v1/responses", {"input": "Hi"}),
}
DEFAULTS = {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "65f0c1"}
LIBRECHAT: dict[str, tuple[str, dict[str, Any]]] = {
    "message": (CHAT, {**DEFAULTS, "stream": True, "messages": [ASKED]}),
    "message, usage": (
        CHAT,
        {**DEFAULTS, "n": 1, "stream": True, "stream_options": {"include_usage": True}, "messages": TURNS},
    ),
    "preset": (
        CHAT,
        {
            "stream": True,
            "user": "65f0c1",
            "messages": [{"role": "system", "content": "Be brief.", "name": "instructions"}, ASKED],
        },
    ),
    "image": (
        CHAT,
        {
            **DEFAULTS,
            "stream": True,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What color is it?"},
                        {"type": "image_url", "image_url": {**IMAGE, "detail": "auto"}},
                    ],
                }
            ],
        },
    ),
    "title": (
        CHAT,
        {"temperature": 0.2, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 16, "messages": [TASK]},
    ),
}


@pytest.fixture(scope="module")
def url(tiny_dirs: dict[str, Path]) -> Iterator[str]:
    load = model_loader(EngineArgs(str(tiny_dirs["chat"]), device="cpu"), NAME, None, SETTINGS)
    with (
        live_controller() as controller,
        live_worker(settings=SETTINGS, controller=controller.url, load=load, name=NAME),
    ):
        until(lambda: controller.registry.models() == [NAME])
        yield controller.url


@pytest.mark.parametrize(("program", "name"), [(p, n) for p in ("OPEN_WEBUI", "LIBRECHAT") for n in globals()[p]])
def test_a_request_of_a_chat_program_is_answered(program: str, name: str, url: str) -> None:
    path, body = globals()[program][name]
    reply = post(url, path, {"model": NAME, **body})
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        assert reply.json()["usage"]["total_tokens"] > 0
        return
    *events, end = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert end == "[DONE]" and reasons[-1] in ("stop", "length") and not any("error" in chunk for chunk in chunks)
    assert ("usage" in chunks[-1]) == ("stream_options" in body)


def test_the_model_is_listed_for_a_chat_program(url: str) -> None:
    reply = get(url, "/v1/models", headers={"Authorization": "Bearer none", "Content-Type": "application/json"})
    assert [(model["id"], model["object"]) for model in reply.json()["data"]] == [(NAME, "model")]


def test_an_answer_cannot_be_continued(url: str) -> None:
    """As Open WebUI asks after "Continue Response"; it shows the reason."""
    reply = post(url, CHAT, {"model": NAME, "messages": TURNS[:2]})
    assert reply.status_code == 400 and "end with a user message" in reply.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_current_timestamp"}}])
def test_a_tool_that_must_be_called_is_refused(choice: object, url: str) -> None:
    body = {"model": NAME, **OPEN_WEBUI["page"][1], "tool_choice": choice}
    reply = post(url, CHAT, body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tool_choice"
