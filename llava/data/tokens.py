"""Tokenize a prompt and know which characters every token came from, for any tokenizer.

Fast tokenizers report offsets. Slow ones do not, so the surface of each token is laid along the text: SentencePiece
pieces (with byte fallback and the blank put in front of a text), byte-level BPE and added tokens.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import TemplateError
from llava.mm_utils import bos_prefix

_BLANK: Final = "\u2581"  # SentencePiece's visible space
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Token(NamedTuple):
    """A token id and the characters [start, end) of the prompt it stands for; empty for what the tokenizer adds."""

    id: int
    start: int
    end: int


def tokenize(prompt: str, tokenizer: Any, *, images: bool) -> list[Token]:
    """Tokens of a whole prompt; ids as `tokenizer_image_token` when `images`, else as the tokenizer alone.

    Neighbouring tokens share characters only where one character takes several tokens.
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


def _encode_fast(text: str, tokenizer: Any) -> list[Token]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, reached = [], 0
    for token_id, (start, end) in zip(encoded.input_ids, encoded.offset_mapping):
        # Byte-level tokenizers leave blanks out of the offsets they report; they belong to the token that follows.
        tokens.append(Token(token_id, min(start, reached), end))
        reached = end
    return tokens


def _encode_slow(text: str, tokenizer: Any) -> list[Token]:
    pieces = tokenizer.tokenize(text)
    ids = tokenizer.convert_tokens_to_ids(pieces)
    data = text.replace(_BLANK, " ").encode()
    # Index of the character that each byte belongs to, and one past the end.
    chars = [index for index, char in enumerate(text.replace(_BLANK, " ")) for _ in char.encode()] + [len(text)]
    tokens, position = [], 0
    for token_id, piece in zip(ids, pieces):
        start, position = _place(_surface(piece, tokenizer), data, position, tokenizer)
        # A byte inside a character counts for all of it.
        end = chars[position - 1] + 1 if position > start else chars[start]
        tokens.append(Token(token_id, chars[start], end))
    return tokens


def _surface(piece: str, tokenizer: Any) -> bytes:
    if piece in tokenizer.added_tokens_encoder:
        return piece.encode()
    if hasattr(tokenizer, "byte_decoder"):
        return bytes(tokenizer.byte_decoder[char] for char in piece)
    if match := _BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(_BLANK, " ").encode()


def _place(surface: bytes, data: bytes, position: int, tokenizer: Any) -> tuple[int, int]:
    """First byte, and one past the last, of `surface` in `data` from `position` on."""
    blanks = 0
    while True:
        for candidate in (surface, surface.removeprefix(b" ")):  # the blank put in front of a text is not in it
            if data.startswith(candidate, position + blanks):
                return position + blanks, position + blanks + len(candidate)
        if not data[position + blanks : position + blanks + 1].isspace():
            raise TemplateError(
                f"{type(tokenizer).__name__} rewrites the text it tokenizes, so answers cannot be found in its tokens; "
                "use the fast version of this tokenizer."
            )
        blanks += 1  # an added token may swallow the blanks around it
