"""From token ids to text as they come: whole characters only, cut at the first stop string, stripped.

This is the one place where output is cleaned (spec/eval.md §1.5, defect R9), so that what is streamed, what the
chat stores and what the evaluator writes are the same characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # tokens of known text decoded again before new ones, at least, for the leading space of a word
_WINDOW = 12  # tokens decoded at once, at most, while every token brings text


class SpecialTokens:
    """What the tokenizer and generation config say about special tokens, looked up once."""

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        self.ids = frozenset(tokenizer.all_special_ids)
        self.vocabulary = len(tokenizer)  # slow to ask for; a model may have more rows than this
        self._by_text = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        self._by_text.update(tokenizer.get_added_vocab())
        configured = getattr(generation_config, "eos_token_id", None)
        ends = {*(configured if isinstance(configured, (list, tuple)) else [configured]), tokenizer.eos_token_id}
        self.end = frozenset(token for token in ends if token is not None)

    def end_ids(self, stop: Iterable[str]) -> frozenset[int]:
        """Ids that end an answer: end of sequence, and every stop string that is one special token.

        The last matter because special tokens (such as `<|im_end|>`) never appear in decoded text.
        """
        return self.end | {self._by_text[text] for text in stop if text in self._by_text}


class Detokenizer:
    """Token ids in, finished text out. Joined pieces equal `tokenizer.decode(ids, skip_special_tokens=True)`.

    Only a short window is decoded at each token, so the cost of an answer is linear in its length. A character whose
    bytes are spread over tokens is held back until complete (CONC-4).
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []  # without special ones
        self._start = self._read = 0  # ids before `_read` have been given out; what is decoded begins at `_start`
        self._known = ""  # the text of those between

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))  # looking for special ones is slow

    def push(self, token: int) -> str:
        """Text completed by this token; empty while a character is unfinished, and for tokens without text."""
        if token in self._special.ids or token >= self._special.vocabulary:
            return ""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What was held back, at the end of the answer; bytes that never became a character show as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self._read == len(self._ids):
            return ""
        if self._read - self._start >= _WINDOW:
            self._start = self._read - _CONTEXT
            self._known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if not final and (text.endswith(_INCOMPLETE) or len(text) <= len(self._known)):
            return ""
        piece = text[len(self._known) :]
        self._read, self._known = len(self._ids), text
        return piece


class TextStream:
    """Cleans text as it comes: `push` returns what may be shown now, `text` is all of it once finished.

    Held back are: a tail that may be the start of a stop string, and white space at the end, which counts only if
    text follows. So the pieces returned always join to `text`.
    """

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self._stop = tuple(text for text in stop if text)
        self._longest = max(map(len, self._stop), default=0)
        self._pending = ""
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def push(self, piece: str, *, final: bool = False) -> str:
        """Add decoded text; sets `stopped` at the first stop string, after which nothing more is taken."""
        if self.stopped:
            return ""
        self._pending += piece
        cuts = [at for at in (self._pending.find(text) for text in self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            self._pending = self._pending[: min(cuts)]
        ready = len(self._pending) if final or self.stopped else len(self._pending) - self._held()
        ready = len(self._pending[:ready].rstrip())
        out, self._pending = self._pending[:ready], self._pending[ready:]
        if not self._shown:
            out = out.lstrip()
        if out:
            self._shown.append(out)
        return out

    def _held(self) -> int:
        """Length of the longest tail that a stop string might begin with."""
        for size in range(min(self._longest - 1, len(self._pending)), 0, -1):
            tail = self._pending[-size:]
            if any(text.startswith(tail) for text in self._stop):
                return size
        return 0
