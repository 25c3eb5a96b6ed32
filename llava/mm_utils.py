"""Multimodal helpers under their published names: prompt ids, images from base64, model names, stopping criteria."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, overload
from weakref import WeakKeyDictionary

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import RenderedPrompt
from llava.errors import ImageError, RequestError
from llava.images import DEFAULT, ImageLimits, open_image
from llava.images import expand2square as expand2square
from llava.images import process_images as process_images

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

_MARKS: Final = tuple(map(chr, range(0xE001, 0xF8FF, 61)))  # private use, which no tokenizer merges with others
_controls: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, ControlTokens]] = WeakKeyDictionary()


def load_image_from_base64(image: str, limits: ImageLimits = DEFAULT) -> Image.Image:
    """Decode base64 text to an RGB image; raises `ImageError` unless it is an image within `limits`."""
    if len(image) > 1.5 * limits.max_bytes + 1024:  # 4 characters for 3 bytes, and line ends
        raise ImageError(f"The image has more than {limits.max_bytes} bytes; send a smaller one.")
    try:
        data = base64.b64decode("".join(image.split()), validate=True)
    except ValueError as error:
        hint = "remove its data: prefix" if image.startswith("data:") else "send the encoded file"
        raise ImageError(f"The image is not valid base64; {hint}.") from error
    return open_image(data, limits=limits)


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`[bos_token_id]` if the tokenizer prepends a BOS to every text, else `[]`."""
    ids = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int = ..., return_tensors: None = ...
) -> list[int]: ...
@overload
def tokenizer_image_token(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int = ..., *, return_tensors: Literal["pt"]
) -> torch.Tensor: ...
def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Token ids of a prompt, with `image_token_index` for each `<image>`; pieces between images are tokenized alone.

    Returns a list, or an int64 tensor (T,) with `return_tensors="pt"`; raises `ValueError` for another value. A BOS
    comes first if and only if the tokenizer adds one.
    """
    prefix = bos_prefix(tokenizer)
    ids = list(prefix)
    for index, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if index:
            ids.append(image_token_index)
        if piece:
            ids += tokenizer(piece).input_ids[len(prefix) :]
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors must be 'pt' for a tensor or None for a list, got {return_tensors!r}.")


class ControlTokens(NamedTuple):
    """Control tokens of a tokenizer: its special tokens, and its added tokens other than words and white space.

    `pattern` matches where one of them or `<image>` begins, with its characters as group 1.
    """

    pattern: re.Pattern[str]
    ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """The control tokens of `tokenizer`, cached until it gets more tokens."""
        added = tokenizer.added_tokens_decoder
        known = _controls.get(tokenizer)
        if known is None or known[0] != len(added):
            strings = {token.content for token in added.values() if token.special or not _is_word(token.content)}
            strings |= {token for token in tokenizer.get_vocab() if re.fullmatch(r"<\|\w+\|>", token)}
            strings |= {DEFAULT_IMAGE_TOKEN, *tokenizer.all_special_tokens}
            choices = sorted((text for text in strings if len(text) > 1), key=len, reverse=True)
            pattern = re.compile(f"(?=({'|'.join(map(re.escape, choices))}))")
            ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(strings - {DEFAULT_IMAGE_TOKEN})))
            known = _controls[tokenizer] = len(added), cls(pattern, ids)
        return known[1]

    def count(self, ids: list[int]) -> int:
        """Number of control tokens in `ids`."""
        return sum(token in self.ids for token in ids)


def _is_word(content: str) -> bool:
    return "".join(content.split()).isalnum() or not content.strip()


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, like `tokenizer_image_token`, but of a `RenderedPrompt` text is encoded as text.

    Where text holds a control token or `<image>`, a private-use character is encoded in the middle of it, and its ids
    are removed. Raises `RequestError` for a tokenizer that leaves no such character apart.
    """
    if not isinstance(prompt, RenderedPrompt):
        return tokenizer_image_token(prompt, tokenizer)
    controls = ControlTokens.of(tokenizer)
    breaks = _breaks(prompt, prompt.text_spans, controls.pattern)
    ids = _encode_apart(prompt, breaks, tokenizer)
    if prompt.isascii():
        return ids
    # Characters such as full-width ones, which some tokenizers normalize.
    forms = {ord(char): form for char in set(prompt) if len(form := unicodedata.normalize("NFKC", char)) == 1}
    lookalikes = _breaks(prompt.translate(forms), prompt.text_spans, controls.pattern)
    if lookalikes <= breaks:
        return ids
    apart = _encode_apart(prompt, breaks | lookalikes, tokenizer)
    return apart if controls.count(apart) < controls.count(ids) else ids


def _encode_apart(prompt: str, breaks: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt in which no token goes across one of the positions `breaks`."""
    if not breaks:
        return tokenizer_image_token(prompt, tokenizer)
    parts = [prompt[start:end] for start, end in pairwise((0, *sorted(breaks), len(prompt)))]
    for mark in islice((mark for mark in _MARKS if mark not in prompt), 3):
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", f"a{mark}"))
        ids, removed = _remove(tokenizer_image_token(mark.join(parts), tokenizer), after[len(before) :])
        if removed == len(breaks):
            return ids
    raise RequestError("The message holds control tokens that this tokenizer cannot encode as text; remove them.")


def _breaks(prompt: str, text_spans: Iterable[tuple[int, int]], pattern: re.Pattern[str]) -> set[int]:
    """Positions in text after the first character of each match of `pattern` that overlaps it."""
    breaks, spans = set(), iter(text_spans)
    start, end = next(spans, (len(prompt), len(prompt)))
    for match in pattern.finditer(prompt):
        while end <= match.start():
            start, end = next(spans, (len(prompt), len(prompt) + 1))
        if start < match.end(1):
            breaks.add(max(match.start() + 1, start))
    return breaks


def _remove(ids: list[int], part: list[int]) -> tuple[list[int], int]:
    """`ids` without the runs of them equal to `part`, and the number of these runs."""
    rest: list[int] = []
    at = removed = 0
    while at < len(ids):
        if part and ids[at : at + len(part)] == part:
            at += len(part)
            removed += 1
        else:
            rest.append(ids[at])
            at += 1
    return rest, removed


def get_model_name_from_path(model_path: str) -> str:
    """Last component of a path, or the last two joined by `_` when the last is `checkpoint-N`."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:])


class KeywordsStoppingCriteria:
    """Stops generation when every row of the batch contains a keyword.

    Keywords are matched in the decoded text of all generated ids, independently of their tokenization; those that are
    special tokens, which decoding skips, are matched by id. `None` and empty keywords never match.
    """

    def __init__(
        self, keywords: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor
    ) -> None:
        self.keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        special = {str(token): token_id for token, token_id in tokenizer.get_added_vocab().items()}
        special.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        self.keyword_ids = {special[keyword] for keyword in self.keywords if keyword in special}
        self._done = [False] * input_ids.shape[0]

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> bool:
        """Whether all rows of `output_ids` (B, T), prompts and generated ids, have stopped."""
        rows = output_ids[:, self.start_len :].tolist()
        if len(rows) != len(self._done):  # beam search, or a batch size other than that of `input_ids`
            self._done = [False] * len(rows)
        self._done = [done or self._found(row) for done, row in zip(self._done, rows)]
        return all(self._done)

    def _found(self, ids: list[int]) -> bool:
        if not self.keyword_ids.isdisjoint(ids):
            return True
        text = self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return any(keyword in text for keyword in self.keywords)
