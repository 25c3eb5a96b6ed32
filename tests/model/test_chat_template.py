"""Chat templates in Jinja render what the conversation templates render, to the character, and every save has one."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest

from llava.conversation import conv_templates
from llava.mm_utils import encode_prompt
from llava.model.chat_template import jinja_template
from llava.model.saving import write_chat_template
from llava.model.tokenizer import load_tokenizer
from llava.serve.common.openai_chat import ChatMessage, render_chat

ROLES = ("user", "assistant")
TEXTS = ("<image>\nWhy?", " yes\n", "{{ 'x' }} {% raw %} \\n \"ü\" 🎈", "\n\n", "a")
IMAGE, WHAT, WHY = {"type": "image"}, {"type": "text", "text": "What?"}, {"type": "text", "text": "Why?\n"}


@pytest.fixture(scope="module")
def tokenizer(tiny_dirs: dict[str, Path]) -> Any:
    return load_tokenizer(tiny_dirs["base"])


def holds_template(directory: Path, name: str) -> bool:
    """Whether the tokenizer saved in `directory` has the chat template of a conversation template."""
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    reloaded: str = load_tokenizer(directory).chat_template
    return settings.get("chat_template") == reloaded == jinja_template(conv_templates[name])


@pytest.mark.parametrize("name", conv_templates)
def test_the_same_characters_and_tokens(name: str, tokenizer: Any) -> None:
    """Two texts of the system, one to five turns, open and closed."""
    template = jinja_template(conv_templates[name])
    for system, count in product((None, "Be brief.\n{{ 1 }}"), range(1, len(TEXTS) + 1)):
        conversation = conv_templates[name].copy()
        messages = []
        if system is not None:
            conversation.set_system(system)
            messages.append({"role": "system", "content": system})
        for index, text in enumerate(TEXTS[:count]):
            conversation.append_message(conversation.roles[index % 2], text)
            messages.append({"role": ROLES[index % 2], "content": text})
        rendered = tokenizer.apply_chat_template(messages, template, tokenize=False)
        assert rendered == conversation.get_prompt()
        if count % 2:
            conversation.append_message(conversation.roles[1], None)
            opened = tokenizer.apply_chat_template(messages, template, add_generation_prompt=True, tokenize=False)
            assert opened == conversation.get_prompt()
    plain = render_chat([ChatMessage(role="user", content="What is it?")], name).prompt
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], template, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer(opened).input_ids == encode_prompt(plain, tokenizer)


@pytest.mark.parametrize("name", conv_templates)
@pytest.mark.parametrize("parts", [[IMAGE, WHAT], [WHAT, IMAGE, WHY], [IMAGE, WHAT, IMAGE, WHY], [WHAT, WHY]])
def test_images_are_placed_as_by_the_api(name: str, parts: list[dict[str, Any]], tokenizer: Any) -> None:
    url = {"type": "image_url", "image_url": {"url": "data:a"}}
    content = [url if part is IMAGE else part for part in parts]
    message = ChatMessage.model_validate({"role": "user", "content": content})
    template = jinja_template(conv_templates[name])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], template, add_generation_prompt=True, tokenize=False
    )
    assert rendered == render_chat([message], name).prompt


def test_tags_of_the_checkpoint_and_turns_that_do_not_alternate(tokenizer: Any) -> None:
    template = jinja_template(conv_templates["v1"], use_im_start_end=True)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": [IMAGE, WHAT]}], template, tokenize=False)
    assert rendered.endswith("USER: <im_start><image><im_end>\nWhat? ")
    for roles in (("assistant",), ("user", "user"), ("user", "system"), ("tool",)):
        with pytest.raises(jinja2.TemplateError, match="must alternate between user and assistant"):
            tokenizer.apply_chat_template([{"role": role, "content": "a"} for role in roles], template, tokenize=False)


def test_copied_files_get_the_template_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "legacy": False}))
    (tmp_path / "chat_template.jinja").write_text("older")
    (tmp_path / "config.json").write_text(json.dumps({"conv_template": "of-a-fork"}))
    write_chat_template(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"chat_template": "old", "legacy": False}
    (tmp_path / "config.json").write_text(json.dumps({"conv_template": "mpt"}))
    write_chat_template(tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found == {"chat_template": jinja_template(conv_templates["mpt"]), "legacy": False}
    assert not (tmp_path / "chat_template.jinja").exists()
