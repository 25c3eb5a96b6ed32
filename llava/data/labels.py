"""Token ids and labels of conversations: answers and their separators are supervised, nothing else.

Labels are derived from the spans of the rendered prompt and the characters of each token, not from token counts. Slow
tokenizers do not report characters, so the text of their tokens is aligned with the prompt: SentencePiece pieces (with
normalization, byte fallback and the prepended space), byte-level BPE and added tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from llava import conversation
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, Span, conv_templates, image_placeholder, stop_strings
from llava.data.records import Turn, drop_greeting, parse_turns
from llava.errors import DataError, TemplateError
from llava.mm_utils import bos_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.arguments import DataArguments

Sources = Sequence[Sequence[Mapping[str, str]]]  # `conversations` lists
_TEXT_STOPS: Final = (SeparatorStyle.SINGLE, SeparatorStyle.PLAIN)  # answers end in plain text, not a special token
_PROBE: Final = (Turn("human", f"{DEFAULT_IMAGE_TOKEN}\nWhat is this?"), Turn("gpt", "A black cat, 3 years old."))
_ODD: Final = "\u2026 \u00bd\u00a0\ufb01 e\u0301 \uff11"  # text that tokenizers normalize
_SPACE: Final = "\u2581"  # the space of SentencePiece
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Example(NamedTuple):
    """`input_ids` (T,) int64, with -200 for each image; `labels` (T,) int64, equal to the ids or -100."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class Token(NamedTuple):
    """A token id and its characters [start, end) of the prompt, which are empty for a BOS the tokenizer adds."""

    id: int
    start: int
    end: int


def build_example(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Conversation, *, has_image: bool
) -> Example:
    """Ids and labels of a conversation; a token is supervised if any of its characters is.

    Raises `DataError` for turns that the template cannot render.
    """
    spans = training_spans(turns, template)
    prompt = "".join(span.text for span in spans)
    supervised = b"".join(bytes([span.supervised]) * len(span.text) for span in spans) + b"\0"
    tokens = tokenize(prompt, tokenizer, images=has_image)
    input_ids = torch.tensor([token.id for token in tokens], dtype=torch.long)  # (T,)
    # A token without characters, such as the space before an answer, is treated as the next character.
    mask = [1 in supervised[token.start : max(token.end, token.start + 1)] for token in tokens]
    keep = torch.tensor(mask, dtype=torch.bool) & (input_ids != IMAGE_TOKEN_INDEX)
    return Example(input_ids, torch.where(keep, input_ids, IGNORE_INDEX))


def count_ids(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Conversation, *, has_image: bool
) -> int:
    """Number of ids of `build_example`, without finding the characters of each."""
    prompt = "".join(span.text for span in training_spans(turns, template))
    pieces = prompt.split(DEFAULT_IMAGE_TOKEN) if has_image else [prompt]
    count = len(bos_prefix(tokenizer)) + len(pieces) - 1
    for piece in filter(None, pieces):
        if tokenizer.is_fast:
            count += len(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
        else:
            count += len(tokenizer.tokenize(piece))
    return count


def truncate(example: Example, limit: int) -> Example:
    """Keep the first `limit` ids; image positions beyond them replace the last text before the cut.

    A dropped position would shift the images of later rows. Raises `DataError` if the images leave no room for text.
    """
    input_ids, labels = example
    if len(input_ids) <= limit:
        return example
    keep = input_ids == IMAGE_TOKEN_INDEX  # (T,)
    images = int(keep.sum())
    check_room(images, limit)
    keep[(~keep).nonzero()[: limit - images]] = True
    return Example(input_ids[keep], labels[keep])


def check_room(images: int, limit: int) -> None:
    """Raise `DataError` if the images of a record that is truncated to `limit` ids leave no room for text."""
    if images >= limit:
        raise DataError(f"{images} images do not fit into {limit} ids; raise --model_max_length.")


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase, *, images: bool) -> list[Token]:
    """Tokens of a prompt, with the ids of `tokenizer_image_token` if `images`, else those of the tokenizer.

    Neighboring tokens overlap only where a character has several tokens.
    """
    tokens = [Token(token_id, 0, 0) for token_id in bos_prefix(tokenizer)]
    start = 0
    for index, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN) if images else [prompt]):
        if index:
            tokens.append(Token(IMAGE_TOKEN_INDEX, start, start + len(DEFAULT_IMAGE_TOKEN)))
            start += len(DEFAULT_IMAGE_TOKEN)
        if piece:
            encode = _encode_fast if tokenizer.is_fast else _encode_slow
            tokens += [Token(token.id, start + token.start, start + token.end) for token in encode(piece, tokenizer)]
        start += len(piece)
    return tokens


def _encode_fast(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, last_end = [], 0
    for token_id, (start, end) in zip(encoded.input_ids, encoded.offset_mapping):
        # Byte-level tokenizers omit spaces from their offsets; they belong to the next token.
        tokens.append(Token(token_id, min(start, last_end), end))
        last_end = end
    return tokens


def _encode_slow(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    pieces = tokenizer.tokenize(text)
    ids = tokenizer.convert_tokens_to_ids(pieces)
    offsets: Sequence[int] = range(len(text) + 1)
    if hasattr(tokenizer, "sp_model"):  # SentencePiece, whose default is NFKC and whose space is not told from others
        text, offsets = tokenizer.sp_model.normalize(text, with_offsets=True)
        text = text.replace(_SPACE, " ")
    data = text.encode()
    # Index of the character of each byte, and of the end.
    chars = [index for index, char in zip(offsets, text) for _ in char.encode()] + [offsets[-1]]
    tokens, position = [], 0
    for token_id, piece in zip(ids, pieces):
        start, position = _find(_token_bytes(piece, tokenizer), data, position, tokenizer)
        # A byte of a character stands for the whole character.
        end = chars[position - 1] + 1 if position > start else chars[start]
        tokens.append(Token(token_id, chars[start], end))
    return tokens


def _token_bytes(piece: str, tokenizer: PreTrainedTokenizerBase) -> bytes:
    if piece in tokenizer.added_tokens_encoder:
        return piece.encode()
    if hasattr(tokenizer, "byte_decoder"):
        return bytes(tokenizer.byte_decoder[char] for char in piece)
    if match := _BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(_SPACE, " ").encode()


def _find(token: bytes, data: bytes, position: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Range [start, end) of `token` in `data`, at `position` or after the whitespace there."""
    while True:
        for candidate in (token, token.removeprefix(b" ")):  # the prepended space is not part of the text
            if data.startswith(candidate, position):
                return position, position + len(candidate)
        if not data[position : position + 1].isspace():
            raise TemplateError(
                f"{type(tokenizer).__name__} normalizes the text it tokenizes, so its tokens cannot be aligned with "
                "answers; use the fast version of this tokenizer."
            )
        position += 1  # added tokens may strip the whitespace around them


def training_spans(turns: Sequence[Turn], template: Conversation) -> list[Span]:
    """Spans of a training prompt: the template's rendering, except for the layouts of `plain` and `v0`."""
    if template.sep_style is SeparatorStyle.PLAIN:
        return _plain_spans(turns, template)
    chat = template.copy()
    chat.messages = []
    if turns and turns[0].role == "system":
        chat.set_system(turns[0].text)
        turns = turns[1:]
    if template.name == conversation.vicuna_v0.name:
        return _v0_spans(turns, chat)
    turns = drop_greeting(turns)
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            raise DataError(f"Turn {index + 1} is from {turn.role!r}; human and gpt turns must alternate.")
        chat.append_message(chat.roles[index % 2], turn.text)
    spans = chat.render()
    if all(turn.learned for turn in turns):
        return spans
    answers = iter([turn.learned for turn in turns if turn.role == "gpt" and turn.text])
    weighed = []
    for supervised, run in groupby(spans, lambda span: span.supervised):
        learned = supervised and next(answers)
        weighed += [span._replace(supervised=learned) for span in run]
    return weighed


def _plain_spans(turns: Sequence[Turn], template: Conversation) -> list[Span]:
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0].text:
        raise DataError(
            f"Template {template.name!r} expects two turns with {DEFAULT_IMAGE_TOKEN} in the first, got {len(turns)} "
            f"with {turns[0].text[:40] if turns else ''!r}; use it for captions only."
        )
    return [
        Span(DEFAULT_IMAGE_TOKEN * turns[0].text.count(DEFAULT_IMAGE_TOKEN), False),
        Span(turns[1].text + template.sep, turns[1].learned),
    ]


def _v0_spans(turns: Sequence[Turn], template: Conversation) -> list[Span]:
    spans = [Span(f"{template.system}\n\n", False)]
    learned = True
    for turn in turns:
        name = template.roles[turn.role != "human"]
        # The separator is supervised everywhere, also in front of human turns, but not after an answer of weight 0.
        spans += [Span("###", learned), Span(f" {name}: {turn.text}\n", turn.role == "gpt" and turn.learned)]
        learned = turn.learned or turn.role != "gpt"
    return [*spans, Span("### ", learned)]


def place_images(text: str, placeholder: str, num_images: int) -> str:
    """Insert placeholders: one on a line in front for a single image, else where `<image>` stands."""
    if num_images == 1 and DEFAULT_IMAGE_TOKEN in text:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return text.replace(DEFAULT_IMAGE_TOKEN, placeholder)


def preprocess(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, list[torch.Tensor]]:
    """`{"input_ids": [(T,)], "labels": [(T,)]}`, int64, rendered with `conversation.default_conversation`.

    As published, only samples without images are truncated to the tokenizer's `model_max_length` here.
    """
    template = conversation.default_conversation
    examples = [build_example(parse_turns(source), tokenizer, template, has_image=has_image) for source in sources]
    if not has_image:
        examples = [truncate(example, tokenizer.model_max_length) for example in examples]
    return {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}


def preprocess_multimodal(sources: Sources, data_args: DataArguments, num_images: int = 1) -> Sources:
    """Copy turns with their image placeholders in training form; text-only runs get `sources` unchanged."""
    if not data_args.is_multimodal:
        return sources
    start_end = getattr(data_args, "mm_use_im_start_end", False)
    placeholder = image_placeholder(conversation.default_conversation, start_end)
    return [
        [{**turn, "value": place_images(turn["value"], placeholder, num_images)} for turn in source]
        for source in sources
    ]


def check_template(tokenizer: PreTrainedTokenizerBase, template: Conversation) -> None:
    """Raise `TemplateError`, naming templates that fit, unless the tokenizer can express and terminate an answer.

    The stop string must be a single token (except in styles that end in plain text), and the supervised ids of a sample
    must decode to its answer.
    """
    problem = _template_problem(tokenizer, template)
    if problem:
        fitting = [name for name, other in conv_templates.items() if not _template_problem(tokenizer, other)]
        raise TemplateError(
            f"Template {template.name!r} does not fit this tokenizer: {problem}; "
            f"templates that fit: {', '.join(fitting) or 'none'}."
        )


def _template_problem(tokenizer: PreTrainedTokenizerBase, template: Conversation) -> str | None:
    (stop,) = stop_strings(template)
    if template.sep_style not in _TEXT_STOPS:
        stop_id = tokenizer.convert_tokens_to_ids(stop)
        ids = tokenizer(f"a{stop}", add_special_tokens=False).input_ids
        known = stop_id is not None and tokenizer.convert_ids_to_tokens(stop_id) == stop  # not the unknown token
        if not known or ids.count(stop_id) != 1:
            return f"its stop string {stop!r} is not a single token"
    try:
        example = build_example(_PROBE, tokenizer, template, has_image=True)
        tokenize(_ODD, tokenizer, images=False)
    except TemplateError as error:
        return str(error.args[0]).rstrip(".")
    ids = [token for token in example.labels.tolist() if token != IGNORE_INDEX]
    text = "".join(tokenizer.decode(ids).split())
    return None if "".join((_PROBE[1].text + stop).split()) in text else f"an answer is decoded to {text!r}"
