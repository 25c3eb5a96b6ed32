"""Incremental detokenization and text clean-up: complete characters, cut at the first stop string, stripped.

Streams, chat histories and answer files all contain this text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # tokens decoded again before new ones, for the leading space of a word
_WINDOW = 12  # most tokens decoded again


class SpecialTokens:
    """Special tokens and end tokens of a tokenizer and generation config, and the texts of its other tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> None:
        self.ids = frozenset(tokenizer.all_special_ids)
        self.vocabulary = len(tokenizer)  # slow to compute; the model's embeddings may have more rows
        self._by_text = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        self._by_text.update(tokenizer.get_added_vocab())
        self.never_text = self.ids | frozenset(self._by_text.values())  # added tokens among them
        configured = getattr(generation_config, "eos_token_id", None)
        ends = {*(configured if isinstance(configured, (list, tuple)) else [configured]), tokenizer.eos_token_id}
        self.end = frozenset(token for token in ends if token is not None)
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def end_ids(self, stop: Iterable[str]) -> frozenset[int]:
        """Ids that end an answer: end of sequence, and stop strings that are one special token.

        Special tokens (such as `<|im_end|>`) never appear in decoded text, so `TextStream` cannot find them.
        """
        return self.end | {self._by_text[text] for text in stop if text in self._by_text}

    def text_of(self, token: int) -> str:
        """Text that a token adds after any word; empty if that depends on its neighbours, or is not known.

        Tokenizers join the texts of such tokens, so these are decoded once; decoding each occurrence takes longer than
        everything else on the host.
        """
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._find_text(token)
        return text

    def _find_text(self, token: int) -> str:
        if token in self.never_text or self._word is None:
            return ""
        word, before = self._word
        text = decode(self._tokenizer, [word, token])[len(before) :]
        repeated = decode(self._tokenizer, [word, token, token, word])
        return text if _INCOMPLETE not in text and repeated == before + text + text + before else ""

    @cached_property
    def _word(self) -> tuple[int, str] | None:
        """A token that is a word, and its text."""
        for token in range(self.vocabulary):
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if piece and piece.isascii() and piece.isalnum() and token not in self.never_text:
                return token, decode(self._tokenizer, [token])
        return None


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, none of which is special."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))  # skipping special tokens is slow


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Bytes of every token: of byte-level BPE, or of SentencePiece, where "▁" is a space and "<0x0A>" a byte."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode  # takes seconds to import

    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    by_byte = bytes_to_unicode()
    by_character = {character: byte for byte, character in by_byte.items()}
    texts = tokenizer.get_added_vocab()
    if by_byte[ord(" ")] in pieces and "\u2581" not in pieces:
        return [
            (piece or "").encode()
            if piece in texts
            else bytes(by_character[one] for one in piece or "" if one in by_character)
            for piece in pieces
        ]
    found = [(piece or "").replace("\u2581", " ").encode() for piece in pieces]
    for at, piece in enumerate(pieces):
        if piece and (byte := _BYTE.fullmatch(piece)):
            found[at] = bytes([int(byte[1], 16)])
    return found


class Detokenizer:
    """Incremental decoder: the pieces join to `tokenizer.decode(ids, skip_special_tokens=True)`.

    A token after a word adds the text that it always adds there. Others decode only a short window, so the cost of an
    answer is linear in its length. A character whose bytes are spread over several tokens is held back until it is
    complete. After the tokens of `context`, the text of the first token keeps the space before its word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids = [token for token in context[-_CONTEXT:] if self._is_text(token)]  # without special tokens
        self._prefix_text = self._decode(self._ids) if self._ids else ""  # text between the two offsets
        if self._prefix_text.endswith(_INCOMPLETE):
            self._ids, self._prefix_text = [], ""
        # The window starts at the first; ids before the second are done.
        self._prefix_offset, self._read_offset = 0, len(self._ids)

    def _is_text(self, token: int) -> bool:
        return token not in self._special.ids and 0 <= token < self._special.vocabulary

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)

    def push(self, token: int) -> str:
        """Add a token and return the text it completes; empty for special tokens and incomplete characters."""
        if not self._is_text(token):
            return ""
        complete = self._read_offset == len(self._ids) > 0
        known = self._special.text_of(token) if complete and self._special.text_of(self._ids[-1]).strip() else ""
        self._ids.append(token)
        if not known:
            return self._advance(final=False)
        self._read_offset += 1
        if self._read_offset - self._prefix_offset < _WINDOW:  # else `_advance` moves the window
            self._prefix_text += known
        return known

    def flush(self) -> str:
        """Return the text held back at the end of an answer; incomplete characters become U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self._read_offset == len(self._ids):
            return ""
        if self._read_offset - self._prefix_offset >= _WINDOW:
            self._prefix_offset = self._read_offset - _CONTEXT
            self._prefix_text = self._decode(self._ids[self._prefix_offset : self._read_offset])
        text = self._decode(self._ids[self._prefix_offset :])
        if not final and (text.endswith(_INCOMPLETE) or len(text) <= len(self._prefix_text)):
            return ""
        piece = text[len(self._prefix_text) :]
        self._read_offset, self._prefix_text = len(self._ids), text
        return piece


class TextStream:
    """Incremental clean-up of text; the pieces that `push` returns join to `text`.

    It holds back a tail that may be the start of a stop string, and trailing white space, which is dropped unless more
    text follows. Without `strip`, leading and trailing white space is kept.
    """

    def __init__(self, stop: Iterable[str] = (), *, strip: bool = True) -> None:
        self._strip = strip
        self._stop = tuple(text for text in stop if text)
        self._longest = max(map(len, self._stop), default=0)
        self._pending = ""
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, piece: str, *, final: bool = False) -> str:
        """Add decoded text and return the text that is final; sets `stopped` at the first stop string."""
        if self.stopped:
            return ""
        self._pending += piece
        cuts = [at for at in (self._pending.find(text) for text in self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            self._pending = self._pending[: min(cuts)]
        ready = len(self._pending) if final or self.stopped else len(self._pending) - self._held()
        if self._strip:
            ready = len(self._pending[:ready].rstrip())
        out, self._pending = self._pending[:ready], self._pending[ready:]
        if self._strip and not self._pieces:
            out = out.lstrip()
        if out:
            self._pieces.append(out)
        return out

    def _held(self) -> int:
        """Length of the longest tail that may be the start of a stop string."""
        for size in range(min(self._longest - 1, len(self._pending)), 0, -1):
            tail = self._pending[-size:]
            if any(text.startswith(tail) for text in self._stop):
                return size
        return 0
