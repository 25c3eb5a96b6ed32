"""Conversation templates: prompts, spans, images and the choice of a template."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava import conversation
from llava.conversation import (
    Conversation,
    SeparatorStyle,
    conv_templates,
    get_template,
    image_placeholder,
    stop_strings,
    template_for,
    with_image_token,
)
from llava.errors import TemplateError

IMAGE = Image.new("RGB", (6, 3), (10, 20, 30))
# Messages U1, A1, U2 and an open turn; {s} is the system text.
RENDERED = {
    "default": "{s}###Human: U1###Assistant: A1###Human: U2###Assistant:",
    "v1": "{s} USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "llama_2": "[INST] <<SYS>>\n{s}\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]",
    "llava_v0": "{s}###Human: U1###Assistant: A1###Human: U2###Assistant:",
    "v0_mmtag": "{s}###Human: U1###Assistant: A1###Human: U2###Assistant:",
    "llava_v1": "{s} USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "v1_mmtag": "{s} USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "llava_llama_2": "[INST] <<SYS>>\n{s}\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]",
    "internlm": "{s}<s><|User|>:U1<eoh>\n<|Bot|>:A1<eoa>\n<s><|User|>:U2<eoh>\n<|Bot|>:",
    "internvl_zh": "{s} <human>: U1 <bot>: A1</s><human>: U2 <bot>:",
    "phi3-chat": "{s}<|end|><|user|>\nU1<|end|><|assistant|>\nA1<|end|><|user|>\nU2<|end|><|assistant|>\n",
    **dict.fromkeys(
        ("mpt", "Hermes-2", "internlm2-chat"),
        "{s}<|im_end|><|im_start|>user\nU1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nU2<|im_end|><|im_start|>assistant\n",
    ),
}


def chat(name: str, *contents: Any) -> Conversation:
    """A copy of a template without its few-shot messages, and turns of alternating roles."""
    template = get_template(name)
    template.messages = []
    for index, content in enumerate(contents):
        template.append_message(template.roles[index % 2], content)
    return template


@pytest.mark.golden
def test_golden_prompts(golden_dir: Path) -> None:
    book = json.loads((golden_dir / "prompts" / "prompts.json").read_text())
    for wanted in book["templates"]:
        template = conv_templates[wanted["name"]]
        for key in ("system", "sep", "sep2", "version", "offset", "stop_str", "stop_token_ids"):
            assert getattr(template, key) == wanted[key], (wanted["name"], key)
        assert (list(template.roles), template.sep_style.name) == (wanted["roles"], wanted["sep_style"])
    checked = 0
    for case in book["cases"]:
        if case.get("reference_defect"):
            continue
        template = get_template(case["template"])
        if case.get("keep_few_shot") is False:
            template.messages = []
        for index, turn in enumerate(case["turns"] if "turns" in case else book["dialogues"][case["dialogue"]]):
            content = (turn[0], IMAGE, turn[1]) if isinstance(turn, list) else turn
            template.append_message(template.roles[index % 2], content)
        assert template.get_prompt() == case["prompt"], case["id"]
        checked += 1
    assert checked > 150


def test_templates_are_frozen() -> None:
    """A digest of all fields of all templates, computed when `test_golden_prompts` passed."""
    fields = [
        [getattr(t, key) for key in ("system", "roles", "messages", "offset", "sep", "sep2")]
        + [name, t.sep_style.name, t.version, t.stop_str, t.stop_token_ids]
        for name, t in conv_templates.items()
    ]
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    assert digest == "9b9927d684b0c1ba844ab39869b7859ec4768412b5d86e70e0a1f56bc51f0b79"


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_prompts(name: str) -> None:
    template = chat(name, "U1", "A1", "U2", None)
    assert template.get_prompt() == RENDERED[name].replace("{s}", template.system)


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_an_image_tuple_renders_in_every_style_and_turn(name: str) -> None:
    later = chat(name, "hi", "ho", ("<image>\nwhat?", IMAGE, "Pad"), None).get_prompt()
    assert later == chat(name, "hi", "ho", "<image>\nwhat?", None).get_prompt()
    first = chat(name, (" <image>\nhello", IMAGE, "Pad"), None).get_prompt()
    if "mmtag" in conv_templates[name].version:
        assert first == chat(name, "<Image><image></Image>", "Received.", "hello", None).get_prompt()
    else:
        assert first == chat(name, "<image>\nhello", None).get_prompt()


TURNS = st.lists(st.text(max_size=8), min_size=1, max_size=6).filter(lambda turns: turns[0] != "")


@given(st.sampled_from(sorted(conv_templates)), TURNS)
def test_spans_mark_answers_and_their_separators(name: str, turns: list[str]) -> None:
    template = chat(name, *turns)
    spans = template.render()
    assert "".join(span.text for span in spans) == template.get_prompt()
    lead, gap = {SeparatorStyle.LLAMA_2: (" ", " ")}.get(template.sep_style, ("", ""))
    if template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.INTERNVL_ZH):
        lead = " "
    answers = [lead + turn + gap + stop_strings(template)[0] for turn in turns[1::2] if turn]
    assert [span.text for span in spans if span.supervised] == answers


@given(st.sampled_from(sorted(conv_templates)), TURNS)
def test_a_closed_turn_extends_the_open_one(name: str, turns: list[str]) -> None:
    """Supervised text is what generation appends to the open prompt."""
    turns = [turn or "x" for turn in turns]
    turns += ["y"] * (len(turns) % 2 == 0)
    open_prompt = chat(name, *turns, None).get_prompt()
    closed = chat(name, *turns, "answer")
    assert closed.get_prompt().startswith(open_prompt)
    produced = closed.get_prompt()[len(open_prompt) :]
    assert produced.startswith(closed.render()[-1].text if name != "internlm" else "answer<eoa>")


def test_an_empty_answer_keeps_its_separator_unless_last() -> None:
    assert chat("v1", "q", "", "r", "a").get_prompt().endswith("USER: q ASSISTANT: </s>USER: r ASSISTANT: a</s>")
    assert chat("v1", "q", "").get_prompt().endswith("USER: q ASSISTANT:")
    assert [span.text for span in chat("v1", "q", "", "r", "a").render() if span.supervised] == [" a</s>"]


def test_plain_renders_an_assistant_turn() -> None:
    assert chat("plain", "<image>", "a caption").get_prompt() == "<image>\na caption\n"


def test_llama_2_strips_no_characters_of_the_system_text() -> None:
    template = chat("llama_2", "q", None)
    template.system = "<s>ystem"
    assert template.get_prompt().startswith("[INST] <<SYS>>\n<s>ystem")


@pytest.mark.parametrize("first", ["", None])
def test_llama_2_needs_a_user_turn(first: str | None) -> None:
    with pytest.raises(TemplateError, match="begin with a user message"):
        chat("llama_2", first, "a").get_prompt()


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_set_system_keeps_the_header(name: str) -> None:
    template = chat(name, "q", None)
    old = template.system
    template.set_system("NEW")
    if template.sep_style is SeparatorStyle.MPT:
        assert template.system == old.split("\n")[0] + "\nNEW"
    else:
        assert template.system == "NEW"
    assert conv_templates[name].system == old


def test_copy_and_dict() -> None:
    template = get_template("v1")
    template.append_message("USER", ("<image>\nhi", IMAGE, "Pad"))
    template.skip_next = True
    copy = template.copy()
    assert copy.messages == template.messages
    assert copy.messages[0] is not template.messages[0]
    assert not copy.skip_next
    assert list(template.dict()) == ["system", "roles", "messages", "offset", "sep", "sep2"]
    assert template.dict()["messages"] == [["USER", "<image>\nhi"]]
    json.dumps(template.dict())
    assert len(conv_templates["v1"].messages) == 0


# ------------------------------------------------------------------ images


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
@pytest.mark.parametrize(
    ("process", "size"), [("Pad", (6, 6)), ("Default", (6, 3)), ("Crop", (6, 3)), ("Resize", (336, 336))]
)
def test_get_images(mode: str, process: str, size: tuple[int, int]) -> None:
    image = IMAGE.convert(mode)
    template = chat("v1", ("a", image, process), "b", "text", "c", ("d", image, process))
    assert [image.size for image in template.get_images(return_pil=True)] == [size, size]
    assert [image.size for image in template.get_images(return_pil=True, return_org=True)] == [(6, 3), (6, 3)]
    for original, kind, shape in ((False, "PNG", size), (True, "JPEG", (6, 3))):
        data = template.get_images(return_org=original)
        assert len(data) == 2
        decoded = Image.open(io.BytesIO(base64.b64decode(data[0])))
        assert (decoded.format, decoded.size) == (kind, shape)
    if process == "Pad":
        assert template.get_images(return_pil=True)[0].getpixel((0, 0)) == (122, 116, 104)


def test_get_images_skips_few_shot_messages_and_rejects_other_modes(capsys: pytest.CaptureFixture[str]) -> None:
    template = get_template("default")
    template.append_message("Human", ("a", IMAGE, "Stretch"))
    with pytest.raises(TemplateError, match="choose Pad, Default, Crop or Resize"):
        template.get_images()
    template.messages[-1] = ["Human", ("a", IMAGE, "Default")]
    assert template.get_images(return_pil=True) == [IMAGE]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("size", "thumb"), [((6, 3), (6, 3)), ((1200, 900), (533, 400)), ((300, 3000), (80, 800)), ((5000, 1), (800, 1))]
)
def test_to_gradio_chatbot(size: tuple[int, int], thumb: tuple[int, int]) -> None:
    template = get_template("default")
    for content in (("<image>\n<b>hi</b>", Image.new("RGBA", size), "Pad"), "ho", "more", None):
        template.append_message(template.roles[len(template.messages) % 2], content)
    (shown, reply), second = template.to_gradio_chatbot()
    assert (reply, second) == ("ho", ["more", None])
    assert shown is not None
    head, data = shown.split(";base64,", 1)
    assert head == '<img src="data:image/jpeg'
    data, tail = data.split('"', 1)
    assert tail == ' alt="user upload image" />&lt;b&gt;hi&lt;/b&gt;'
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == thumb


# ------------------------------------------------------------------ helpers


def test_with_image_token() -> None:
    plain, tagged = conv_templates["v1"], conv_templates["v1_mmtag"]
    config = SimpleNamespace(mm_use_im_start_end=True)
    assert with_image_token("q", plain, object()) == "<image>\nq"
    assert with_image_token("q", plain, object(), count=2) == "<image>\n<image>\nq"
    assert with_image_token("q", plain, config) == "<im_start><image><im_end>\nq"
    assert (
        with_image_token("a <image> b <image>", tagged, object()) == "a <Image><image></Image> b <Image><image></Image>"
    )
    assert image_placeholder(tagged, True) == "<Image><im_start><image><im_end></Image>"


def test_stop_strings() -> None:
    wanted = {
        **dict.fromkeys(("default", "v0", "llava_v0", "v0_mmtag"), "###"),
        **dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "v1_mmtag"), "</s>"),
        **dict.fromkeys(("llama_2", "llava_llama_2", "internvl_zh"), "</s>"),
        **dict.fromkeys(("mpt", "Hermes-2", "internlm2-chat"), "<|im_end|>"),
        **dict.fromkeys(("plain", "v0_plain"), "\n"),
        "phi3-chat": "<|end|>",
        "internlm": "<eoa>",
    }
    assert {name: stop_strings(template) for name, template in conv_templates.items()} == {
        name: (stop,) for name, stop in wanted.items()
    }


def test_get_template_is_a_copy_and_names_the_nearest() -> None:
    get_template("v1").append_message("USER", "hi")
    assert len(conv_templates["v1"].messages) == 0
    for name, nearest in {"vicuna_v2": "vicuna_v1", "hermes-2": "Hermes-2", "": None}.items():
        with pytest.raises(TemplateError, match="Unknown conversation template") as error:
            get_template(name)
        assert nearest is None or f"the nearest is {nearest!r}" in str(error.value)
        assert all(choice in str(error.value) for choice in conv_templates)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("InternVL-Chat-ViT-6B-Vicuna-7B", "vicuna_v1"),
        ("InternVL-Chat-ViT-6B-Vicuna-13B-448px", "vicuna_v1"),
        ("finetune_internvit6b_448_v1_5_vicuna13b", "vicuna_v1"),
        ("InternVL-Chat-Chinese-V1-1", "internvl_zh"),
        ("InternVL-Chat-V1-2-Plus", "Hermes-2"),
        ("InternVL-Chat-V1-5", "internlm2-chat"),
        ("Mini-InternVL-Chat-4B-V1-5", "phi3-chat"),
        ("Mini-InternVL-Chat-2B-V1-5", "internlm2-chat"),
        ("llava-v1.5-13b", "llava_v1"),
        ("LLaVA-Lightning-MPT-7B-preview", "mpt"),
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("LLaVA-7b-v0", "llava_v0"),
        ("attempt-mpthing", "vicuna_v1"),
        ("a", "vicuna_v1"),
    ],
)
def test_template_by_name_warns(name: str, template: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert template_for(SimpleNamespace(), name) == template
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert template in conv_templates


def test_the_template_of_the_checkpoint_takes_precedence_over_its_name(caplog: pytest.LogCaptureFixture) -> None:
    config = SimpleNamespace(conv_template="v1")
    assert template_for(config, "mpt-7b") == "v1"
    assert template_for(config, "x", override="vicuna_v1") == "vicuna_v1"
    assert not caplog.records
    assert template_for(config, "x", override="mpt") == "mpt"
    assert "trained with template 'v1'" in caplog.text
    strange = SimpleNamespace(conv_template="home-made")  # of a fork; a known one can be requested
    assert template_for(strange, "x", override="v1") == "v1"
    assert "trained with template 'home-made'" in caplog.text
    for broken in ({"override": "nope"}, {"config": SimpleNamespace(conv_template="nope")}):
        with pytest.raises(TemplateError, match="nope"):
            template_for(**{"config": config, "model_name": "x", **broken})


def test_default_template() -> None:
    assert conversation.default_conversation is conv_templates["default"]
