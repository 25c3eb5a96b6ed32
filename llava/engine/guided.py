"""Structured output: token masks from JSON schemas, regular expressions and choices, computed by llguidance."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from llava.engine.detokenizer import SpecialTokens
from llava.engine.sequence import GuidedDecodingParams
from llava.errors import RequestError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMPILED: Final = 64  # grammars kept
_REASON: Final = 300  # characters
_SAMPLE: Final = '{"a": [1, "é 漢"]}'
_PLACE: Final = re.compile(r"^at \d+\(\d+\): ")  # in the grammar around what the client sent
_ANCHORS: Final = re.compile(r"^\^|(?<!\\)\$$")  # implied, since the whole answer matches
# Limit white space in JSON to a line break and an indentation: small models repeat it up to the token limit.
_JSON: Final = {"whitespace_pattern": r"\r?\n[ \t]{0,20}|[ \t]{1,20}"}


class Guide:
    """Grammar state of one answer."""

    def __init__(self, matcher: Any, executor: Any, width: int, end_ids: frozenset[int]) -> None:
        self.matcher = matcher
        self.executor = executor
        self.width = width  # of a mask, in words of 32 tokens
        self._ends = [(token >> 5, np.uint32(1 << (token & 31))) for token in end_ids]

    def append(self, token: int) -> None:
        """Advance by a token that is not an end token."""
        self.matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether only an end token can follow."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def error(self) -> str:
        """Why the answer cannot be continued, such as a grammar that needs too much memory; empty if it can."""
        return one_line(self.matcher.get_error(), _REASON) if self.matcher.is_error() else ""

    def finish_mask(self, mask: np.ndarray) -> None:
        """Allow the request's end tokens in a mask (width,) uint32 if the grammar allows the answer to end."""
        if self.matcher.is_error():
            mask[:] = 0
        elif self.matcher.is_accepting():
            for word, bit in self._ends:
                mask[word] |= bit


def grammar_masks(guides: Sequence[Guide]) -> Tensor:
    """Masks (n, width) int32 of the next tokens, computed in parallel; bit i of word w allows token 32 w + i."""
    width = guides[0].width
    masks = torch.zeros(len(guides), width, dtype=torch.int32)
    if len(guides) == 1:
        guides[0].matcher.unsafe_compute_mask_ptr(masks.data_ptr(), 4 * width)
    else:
        work = [(guide.matcher, row) for row, guide in enumerate(guides)]
        guides[0].executor.unsafe_compute_mask_ptr(work, masks.data_ptr(), 4 * width, len(guides))
    words = masks.numpy().view(np.uint32)
    for guide, mask in zip(guides, words, strict=True):
        guide.finish_mask(mask)
    return masks


class GrammarCompiler:
    """Compiles structures to grammars over the tokens of a tokenizer, for logits of `vocabulary` entries.

    Raises `RequestError` if llguidance is not installed or the tokenizer is not supported.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[bytes], special: SpecialTokens, vocabulary: int
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "Structured output needs the package llguidance, which is not installed; run: pip install llava[serve]"
            ) from error
        encoded = b"".join(tokens[token] for token in tokenizer.encode(_SAMPLE, add_special_tokens=False))
        if encoded.decode("utf-8", "replace").strip() != _SAMPLE or not special.end:
            raise RequestError(
                f"Structured output is not supported for the tokenizer {type(tokenizer).__name__}; it must be a "
                "byte-level BPE or a SentencePiece tokenizer, with an end token."
            )
        self._library = llguidance
        self._width = -(-vocabulary // 32)
        self._executor = llguidance.LLExecutor()
        self._limits = llguidance.LLParserLimits(verbose_errors=False)  # its defaults bound time and memory
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokens, special, 32 * self._width)), eos_token=sorted(special.end)
        )
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: GuidedDecodingParams) -> Any:
        """The grammar of `params`, from the cache if possible; thread-safe. Raises `RequestError` if it is invalid."""
        kind, text = params.source
        with self._lock:
            matcher = self._compiled.get((kind, text))
        if matcher is None:
            grammar = self._grammar(kind, text)
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if matcher.is_error():
                raise RequestError(f"The {params.name} cannot be used: {self._reason(kind, text, matcher)}")
        with self._lock:
            self._compiled[kind, text] = matcher
            self._compiled.move_to_end((kind, text))
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        return matcher

    def start(self, params: GuidedDecodingParams, end_ids: frozenset[int]) -> Guide:
        """The grammar state of a new answer; `end_ids` are its end tokens."""
        return Guide(self.compile(params).deep_copy(), self._executor, self._width, end_ids)

    def _grammar(self, kind: str, text: str) -> str:
        """A grammar in llguidance's Lark syntax. A leading space is allowed, which is stripped from the answer."""
        if kind == "json":
            schema = json.loads(text)
            schema = schema if isinstance(schema, bool) else {"x-guidance": _JSON, **schema}
            return f'start: " "? answer\nanswer: %json {json.dumps(schema)}'
        text = "|".join(map(re.escape, json.loads(text))) if kind == "choice" else _ANCHORS.sub("", text)
        pattern = self._library.regex_to_lark(f" ?(?:{text})", use_ascii="dw")  # \d and \w as in JSON Schema
        return f"start: /{pattern}/"

    def _reason(self, kind: str, text: str, matcher: Any) -> str:
        """Why a grammar was refused, without the grammar around it."""
        library = self._library.LLMatcher
        bare = library.grammar_from_json_schema(text) if kind == "json" else library.grammar_from_regex(text)
        reason = library.validate_grammar(bare, self._tokenizer) or matcher.get_error()
        return one_line(_PLACE.sub("", reason.partition("\n   1 | ")[0]), _REASON)


class _Vocabulary:
    """A tokenizer with the interface that llguidance requires; llguidance encodes single bytes only."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: SpecialTokens, size: int) -> None:
        self.eos_token_id = min(special.end)
        self.special_token_ids = sorted(special.never_text)
        self.tokens = [*tokens, *[b""] * (size - len(tokens))][:size]
        hidden = special.never_text
        self._bytes = {token[0]: at for at, token in enumerate(tokens) if len(token) == 1 and at not in hidden}

    def __call__(self, text: bytes) -> list[int]:
        return [self._bytes[byte] for byte in text if byte in self._bytes]
