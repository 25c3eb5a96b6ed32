"""Messages to prompts and back, in every template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llava.conversation import conv_templates
from llava.serve.common.openai_chat import ChatBody, ChatMessage, parse_prompt, render_chat
from llava.serve.common.protocol import ErrorType, FrameReader, Message, ServeError, encode_frame

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


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"tools": [{}]},
        {"tool_choice": "required"},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"top_k": 5},
        {"\ud800": None, "unheard_of": {}},
    ],
    ids=str,
)
def test_what_is_not_served_is_refused(extra: dict[str, Any]) -> None:
    base = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(ValidationError, match=f"{list(extra)[-1]} is not supported"):
        ChatBody.model_validate({**base, **extra})
    harmless = {"n": 1, "tools": None, "logprobs": False, "user": "u", "tool_choice": "auto", "metadata": {"a": "b"}}
    assert ChatBody.model_validate({**base, **harmless}).stop == []


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
