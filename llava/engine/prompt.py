"""From a question and its pictures to a rendered prompt: a single turn, the answer left open."""

from __future__ import annotations

from typing import Any

from llava.conversation import Conversation, with_image_token


def render_question(template: Conversation, text: str, images: int, config: Any) -> str:
    """The prompt of a single-turn question (spec/eval.md §1.3); `template` stays as it is."""
    conversation = template.copy()
    question = with_image_token(text, template, config, images) if images else text
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
