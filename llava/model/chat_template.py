"""Chat templates: conversation templates as Jinja, in the `chat_template` of tokenizers.

As in prompts, there is no BOS token: it is added when the text is tokenized (`tokenizer(text)`, the processor of
transformers 5, llama.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llava.conversation import Conversation, SeparatorStyle, conv_templates, get_template, image_placeholder

_SYSTEM, *_TURNS = map(chr, range(0xE000, 0xE005))  # placeholders for text, which no template contains
# The parts of the template are set before it. As in the chat API, a single image is moved before the text of its
# message, and several images stay in place.
_BODY: Final = r"""
{%- macro text(content) -%}
{%- if content is string -%}
{{ content }}
{%- elif content | rejectattr('type', 'equalto', 'text') | list | length > 1 -%}
{%- for part in content -%}
{{ ('' if loop.first else '\n') + (part['text'] if part['type'] == 'text' else image) }}
{%- endfor -%}
{%- else -%}
{%- for part in content -%}{%- if part['type'] != 'text' -%}{{ image + '\n' }}{%- endif -%}{%- endfor -%}
{{ content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n') }}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = text(messages[0]['content']) -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set turns = messages -%}
{%- endif -%}
{{ before_system + system }}
{%- for message in turns -%}
{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}
{{ (first_user if loop.first else user) + text(message['content']) + after_user }}
{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}
{{ assistant + text(message['content']) + after_assistant }}
{%- else -%}
{{ raise_exception('Messages must alternate between user and assistant, after an optional system message.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ generation }}{%- endif -%}
"""


def jinja_template(template: Conversation, use_im_start_end: bool = False) -> str:
    """The Jinja source that renders messages to the same characters as `template` renders its turns.

    A system message replaces the system text, and images are parts of a message's content.
    """

    def rendered(*turns: str | None) -> str:
        conversation = template.copy()
        conversation.set_system(_SYSTEM)
        for index, turn in enumerate(turns):
            conversation.append_message(conversation.roles[index % 2], turn)
        return conversation.get_prompt()

    def after(mark: str, text: str) -> str:
        return text.rpartition(mark)[2]

    question, answer, again, last = _TURNS
    whole = rendered(*_TURNS)
    before_system, _, rest = whole.partition(_SYSTEM)
    after_user, after_assistant = after(question, rendered(question)), after(last, whole)
    is_mpt = template.sep_style is SeparatorStyle.MPT  # its system text follows a header
    parts = {
        "before_system": before_system,
        "system": template.system.partition("\n")[2] if is_mpt else template.system,
        "first_user": rest.partition(question)[0],
        "user": after(answer, whole).partition(again)[0].removeprefix(after_assistant),
        "after_user": after_user,
        "assistant": after(question, whole).partition(answer)[0].removeprefix(after_user),
        "after_assistant": after_assistant,
        "generation": after(question, rendered(question, None)).removeprefix(after_user),
        "image": image_placeholder(template, use_im_start_end),
    }
    lines = [f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}" for name, text in parts.items()]
    return "\n".join(lines) + _BODY


def chat_template_of(config: Mapping[str, object]) -> str | None:
    """The chat template for the `conv_template` of a chat model's configuration; `None` if it names no known one."""
    name = config.get("conv_template")
    if not isinstance(name, str) or name not in conv_templates:
        return None
    return jinja_template(get_template(name), bool(config.get("mm_use_im_start_end")))


def set_chat_template(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Set the chat template of a tokenizer, see `chat_template_of`; without one, the tokenizer keeps its own."""
    tokenizer.chat_template = chat_template_of(vars(config)) or tokenizer.chat_template
