"""Does a conversation template fit a tokenizer? Asked once, before training (users.md TOK-2)."""

from __future__ import annotations

from typing import Any, Final

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates, stop_strings
from llava.data.labels import build_example
from llava.data.records import Turn
from llava.errors import TemplateError

# Their answers end in plain text, which any tokenizer can write.
_TEXT_STOPS: Final = (SeparatorStyle.SINGLE, SeparatorStyle.PLAIN)
_PROBE: Final = (Turn("human", f"{DEFAULT_IMAGE_TOKEN}\nWhat is this?"), Turn("gpt", "A black cat, 3 years old."))


def check_template(tokenizer: Any, template: Conversation) -> None:
    """Raise `TemplateError`, naming the templates that fit, unless the tokenizer can write and end an answer.

    The stop string must be one token (except in styles that end in plain text), and the supervised ids of a sample
    must decode to its answer.
    """
    problem = _problem(tokenizer, template)
    if problem:
        fitting = [name for name, other in conv_templates.items() if not _problem(tokenizer, other)]
        raise TemplateError(
            f"Template {template.name!r} does not fit this tokenizer: {problem}; "
            f"templates that fit: {', '.join(fitting) or 'none'}."
        )


def _problem(tokenizer: Any, template: Conversation) -> str | None:
    (stop,) = stop_strings(template)
    if template.sep_style not in _TEXT_STOPS:
        stop_id = tokenizer.convert_tokens_to_ids(stop)
        ids = tokenizer(f"a{stop}", add_special_tokens=False).input_ids
        known = stop_id is not None and tokenizer.convert_ids_to_tokens(stop_id) == stop  # else it is the unknown token
        if not known or ids.count(stop_id) != 1:
            return f"{stop!r}, which ends an answer, is not one of its tokens"
    try:
        example = build_example(_PROBE, tokenizer, template, has_image=True)
    except TemplateError as error:
        return str(error.args[0]).rstrip(".")
    ids = [token for token in example.labels.tolist() if token != IGNORE_INDEX]
    text = "".join(tokenizer.decode(ids).split())
    return None if "".join((_PROBE[1].text + stop).split()) in text else f"an answer comes back as {text!r}"
