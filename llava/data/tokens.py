"""Tokenization with character offsets, for fast and slow tokenizers.

Slow tokenizers do not report offsets, so the text of each token is aligned with the prompt: SentencePiece pieces (with
byte fallback and the prepended space), byte-level BPE and added tokens.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import TemplateError
from llava.mm_utils import bos_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE: Final = "\u2581"  # the space of SentencePiece
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Token(NamedTuple):
    """A token id and its characters [start, end) of the prompt, which are empty for a BOS the tokenizer adds."""

    id: int
    start: int
    end: int


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
    data = text.replace(_SPACE, " ").encode()
    # Index of the character of each byte, and of the end.
    chars = [index for index, char in enumerate(text.replace(_SPACE, " ")) for _ in char.encode()] + [len(text)]
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
