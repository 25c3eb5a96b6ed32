"""Input ids and labels of a conversation: the answers and what ends them are supervised, nothing else.

Labels follow from the spans the renderer marks and from the characters each token covers (users.md TOK-1); no
lengths are subtracted. Where the published code is right the result is the same (spec/train.md §4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from llava import conversation
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, Span, conv_templates, image_placeholder, stop_strings
from llava.data.records import Turn, drop_greeting, parse_turns
from llava.data.tokens import tokenize
from llava.errors import DataError, TemplateError


class Example(NamedTuple):
    """`input_ids` (T,) int64 with -200 per image; `labels` (T,) int64, equal to the ids or -100."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def build_example(
    turns: Sequence[Turn],
    tokenizer: Any,
    template: Conversation,
    *,
    has_image: bool,
    model_max_length: int | None = None,
) -> Example:
    """Ids and labels of one conversation, cut by `truncate` when `model_max_length` is given.

    A token is supervised when any character of it is. Raises `DataError` for turns the template cannot hold.
    """
    spans = training_spans(turns, template)
    prompt = "".join(span.text for span in spans)
    supervised = b"".join(bytes([span.supervised]) * len(span.text) for span in spans) + b"\0"
    tokens = tokenize(prompt, tokenizer, images=has_image)
    input_ids = torch.tensor([token.id for token in tokens], dtype=torch.long)  # (T,)
    # An empty token, such as the blank before an answer, goes with the character it precedes.
    mask = [1 in supervised[token.start : max(token.end, token.start + 1)] for token in tokens]
    keep = torch.tensor(mask, dtype=torch.bool) & (input_ids != IMAGE_TOKEN_INDEX)
    labels = torch.where(keep, input_ids, IGNORE_INDEX)  # (T,)
    example = Example(input_ids, labels)
    return example if model_max_length is None else truncate(example, model_max_length)


def truncate(example: Example, limit: int) -> Example:
    """At most `limit` ids from the front; image positions behind the cut stay, in place of the last text before it.

    Losing one would hand its image to the next row of the batch. Raises `DataError` when no text fits beside them.
    """
    input_ids, labels = example
    if len(input_ids) <= limit:
        return example
    keep = input_ids == IMAGE_TOKEN_INDEX  # (T,)
    images = int(keep.sum())
    if images >= limit:
        raise DataError(f"{images} images do not fit into {limit} ids; raise --model_max_length.")
    keep[(~keep).nonzero()[: limit - images]] = True
    return Example(input_ids[keep], labels[keep])  # (limit,) each


def training_spans(turns: Sequence[Turn], template: Conversation) -> list[Span]:
    """What training shows the model: the template's own rendering, except for the two layouts of §4.6 and §4.7."""
    if template.sep_style is SeparatorStyle.PLAIN:
        return _plain_spans(turns, template)
    chat = template.copy()
    chat.messages = []
    if turns and turns[0].role == "system":
        chat.set_system(turns[0].text)
        turns = turns[1:]
    if template.name == conversation.vicuna_v0.name:
        return _v0_spans(turns, chat)
    for index, (role, text) in enumerate(drop_greeting(turns)):
        if role != ("human", "gpt")[index % 2]:
            raise DataError(f"Turn {index + 1} is from {role!r}; human and gpt turns must alternate.")
        chat.append_message(chat.roles[index % 2], text)
    return chat.render()


def _plain_spans(turns: Sequence[Turn], template: Conversation) -> list[Span]:
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0].text:
        raise DataError(
            f"Template {template.name!r} takes two turns with {DEFAULT_IMAGE_TOKEN} in the first, found {len(turns)} "
            f"with {turns[0].text[:40] if turns else ''!r}; use it for captions only."
        )
    return [
        Span(DEFAULT_IMAGE_TOKEN * turns[0].text.count(DEFAULT_IMAGE_TOKEN), False),
        Span(turns[1].text + template.sep, True),
    ]


def _v0_spans(turns: Sequence[Turn], template: Conversation) -> list[Span]:
    spans = [Span(f"{template.system}\n\n", False)]
    for role, text in turns:
        word = template.roles[role != "human"]
        # The mark that ends an answer is supervised wherever it stands, at the head of a human turn too.
        spans += [Span("###", True), Span(f" {word}: {text}\n", role == "gpt")]
    return [*spans, Span("### ", True)]


def preprocess(
    sources: Sequence[Sequence[Mapping[str, str]]], tokenizer: Any, has_image: bool = False
) -> dict[str, list[torch.Tensor]]:
    """`{"input_ids": [(T,)], "labels": [(T,)]}`, int64, under `conversation.default_conversation` (§4.2).

    As published, only text samples are cut to the tokenizer's `model_max_length` here.
    """
    limit = None if has_image else tokenizer.model_max_length
    examples = [
        build_example(
            parse_turns(source),
            tokenizer,
            conversation.default_conversation,
            has_image=has_image,
            model_max_length=limit,
        )
        for source in sources
    ]
    return {
        "input_ids": [example.input_ids for example in examples],
        "labels": [example.labels for example in examples],
    }


def preprocess_multimodal(
    sources: Sequence[Sequence[Mapping[str, str]]], data_args: Any, num_images: int = 1
) -> Sequence[Sequence[Mapping[str, str]]]:
    """Turns with their placeholders in training form, as new objects (§4.1); unchanged in a run without a tower."""
    if not data_args.is_multimodal:
        return sources
    placeholder = image_placeholder(conversation.default_conversation, data_args.mm_use_im_start_end)
    return [
        [{**turn, "value": place_images(turn["value"], placeholder, num_images)} for turn in source]
        for source in sources
    ]


def place_images(text: str, placeholder: str, num_images: int) -> str:
    """One image: a single placeholder on a line of its own in front; several: each stays where it is."""
    if num_images == 1 and DEFAULT_IMAGE_TOKEN in text:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return text.replace(DEFAULT_IMAGE_TOKEN, placeholder)


# --- Does a conversation template fit a tokenizer? Asked once ---------------------------------------------------------


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
