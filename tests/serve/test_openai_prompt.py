"""Messages to prompts and back, in every template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llava.conversation import conv_templates
from llava.serve.common.openai_chat import ChatBody, ChatMessage, parse_prompt, render_chat
from llava.serve.common.protocol import ErrorType, FrameReader, GenerateBody, Message, ServeError, encode_frame

IMAGE = {"type": "image_url", "image_url": {"url": "data:a"}}


def messages(*contents: Any) -> list[ChatMessage]:
    """Messages of user and assistant in turn."""
    return [
        ChatMessage.model_validate({"role": ("user", "assistant")[k % 2], "content": content})
        for k, content in enumerate(contents)
    ]


def test_an_image_goes_in_front_as_in_training() -> None:
    rendered = render_chat(messages([{"type": "text", "text": "What is it?"}, IMAGE]), "vicuna_v1")
    assert rendered.prompt.endswith("USER: <image>\nWhat is it? ASSISTANT:")
    assert rendered.stop == ["</s>"]
    assert rendered.images == ["data:a"]


def test_several_images_keep_their_places() -> None:
    parts = [IMAGE, {"type": "text", "text": "and"}, IMAGE, {"type": "text", "text": "differ how?"}]
    assert "USER: <image>\nand\n<image>\ndiffer how? ASSISTANT:" in render_chat(messages(parts), "v1").prompt


def test_neighbours_of_one_role_are_joined_and_the_system_text_is_set() -> None:
    chat = [ChatMessage(role=role, content=text) for role, text in (("developer", "S"), ("user", "a"), ("user", "b"))]
    assert render_chat(chat, "vicuna_v1").prompt == "S USER: a\nb ASSISTANT:"


@pytest.mark.parametrize("contents", [("a", "b"), ()], ids=["ends with the assistant", "empty"])
def test_what_is_no_conversation_is_refused(contents: tuple[str, ...]) -> None:
    with pytest.raises(ServeError) as refused:
        render_chat(messages(*contents), "v1")
    assert refused.value.kind is ErrorType.BAD_REQUEST


def test_a_template_that_cannot_begin_with_nothing_refuses_it() -> None:
    with pytest.raises(ServeError, match="begin with a user message"):
        render_chat(messages(""), "llama_2")


def test_images_belong_to_users() -> None:
    with pytest.raises(ServeError, match="role 'assistant' must not contain images"):
        render_chat(messages("a", [IMAGE], "b"), "v1")


@pytest.mark.parametrize(
    "template", ["vicuna_v1", "llava_v1", "mpt", "Hermes-2", "phi3-chat", "internvl_zh", "llava_v0"]
)
@given(texts=st.lists(st.sampled_from(["hello", "what is 2 + 2?", "漢字 😀", "two\nlines"]), min_size=1, max_size=5))
def test_parsing_undoes_rendering(template: str, texts: list[str]) -> None:
    texts = texts if len(texts) % 2 else texts[:-1] or ["hello"]
    parsed = parse_prompt(render_chat(messages(*texts), template).prompt, template)
    assert [turn.content for turn in parsed if turn.role != "system"] == texts
    assert [turn.role for turn in parsed if turn.role != "system"] == [
        ("user", "assistant")[k % 2] for k in range(len(texts))
    ]


def test_every_template_renders() -> None:
    for name in conv_templates:
        assert "hello" in render_chat(messages("hello"), name).prompt


def test_a_prompt_in_another_form_is_refused() -> None:
    with pytest.raises(ServeError, match="not in this model's template"):
        parse_prompt("just text", "vicuna_v1")
    assert parse_prompt("anything", "plain") == [Message(role="user", content="anything")]


BASE = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tool_choice": "required"},
        {"modalities": ["audio"]},
        {"best_of": 5},
        {"\ud800": None, "unheard_of": {}},
    ],
    ids=str,
)
def test_what_is_not_served_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{list(extra)[-1]} is not supported"):
        ChatBody.model_validate({**BASE, **extra})
    harmless = {"n": 1, "tools": None, "logprobs": False, "user": "u", "tool_choice": "auto", "metadata": {"a": "b"}}
    assert ChatBody.model_validate({**BASE, **harmless}).stop == []


SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": None}}}
SAMPLING = {
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": -1,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {"12": -100},
    "n": 2,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    "guide",
    [{"response_format": FORMAT}, {"guided_json": SCHEMA}, {"guided_regex": "[ab]+"}, {"guided_choice": ["yes", "no"]}],
    ids=lambda guide: next(iter(guide)),
)
def test_sampling_fields_reach_the_worker(guide: dict[str, Any]) -> None:
    body = ChatBody.model_validate({**BASE, **SAMPLING, **guide, "logprobs": True, "top_logprobs": 3, "seed": 7})
    sent = body.worker_fields()
    assert sent == {"temperature": 1.0, "top_p": 1.0, "seed": 7, **SAMPLING, **guide, "top_logprobs": 3}
    received = GenerateBody.model_validate({"prompt": "x", **sent})
    assert received.worker_fields() == sent and received.num_logprobs == 3
    schema = received.schema_of_answer
    assert schema is None if "guided_json" not in guide and "response_format" not in guide else schema == SCHEMA
    assert schema is None or json.dumps(schema) == json.dumps(SCHEMA)  # the order of keys is that of the answer


@pytest.mark.parametrize(("name", "value"), [("json", SCHEMA), ("regex", "[ab]+"), ("choice", ["yes", "no"])])
def test_the_newer_name_of_vllm_for_structured_output(name: str, value: object) -> None:
    for both in ({}, {f"guided_{name}": value}):
        body = ChatBody.model_validate({**BASE, "structured_outputs": {name: value, "grammar": None}, **both})
        assert body.worker_fields()[f"guided_{name}"] == value


def test_defaults_send_the_published_fields_only() -> None:
    nothing = {"top_k": -1, "min_p": 0, "n": None, "logit_bias": {}, "top_logprobs": 0, "response_format": None}
    for body in ({}, {"logprobs": False, "response_format": {"type": "text"}}, nothing):
        sent = ChatBody.model_validate({**BASE, **body}).worker_fields()
        assert sent == {"temperature": 1.0, "top_p": 1.0, "seed": None}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": {"const": 65_536 * "x"}}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": ["a"]}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "guided_regex"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused_by_name(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ChatBody.model_validate({**BASE, **wrong})
    error = refused.value.errors()[0]
    assert error.get("ctx", {}).get("param", [*error["loc"], None][0]) == param


@given(
    texts=st.lists(st.text(), max_size=5),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_frames_survive_any_split(texts: list[str], sizes: list[int]) -> None:
    wire = b"".join(encode_frame({"text": text, "error_code": 0}) for text in texts)
    reader, found, at = FrameReader(), [], 0
    for size in [*sizes, len(wire)]:
        found += list(reader.feed(wire[at : at + size]))
        at += size
    found += list(reader.close())
    assert [frame["text"] for frame in found] == texts


@pytest.mark.parametrize("bad", [b"[1]\0", b"nonsense\0", b'"x"\0'])
def test_what_is_no_frame_is_a_value_error(bad: bytes) -> None:
    with pytest.raises(ValueError):
        list(FrameReader().feed(bad))
    with pytest.raises(ValueError, match="larger"):
        list(FrameReader(max_bytes=10).feed(b"x" * 11))
