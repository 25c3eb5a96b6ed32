"""Helpers around prompts and images that keep their published names and signatures (spec/train.md §1)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import ImageError
from llava.images import DEFAULT, ImageLimits, expand2square, open_image, process_images

__all__ = [
    "KeywordsStoppingCriteria",
    "expand2square",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_images",
    "tokenizer_image_token",
]


def load_image_from_base64(image: str, limits: ImageLimits = DEFAULT) -> Any:
    """The RGB PIL image in base64 text; raises `ImageError` when it is not one within `limits`."""
    if len(image) > 1.5 * limits.max_bytes + 1024:  # base64 takes 4 characters for 3 bytes, and line ends
        raise ImageError(f"The image has more than {limits.max_bytes} bytes; send a smaller one.")
    try:
        data = base64.b64decode("".join(image.split()), validate=True)
    except ValueError as error:
        hint = "leave its data: prefix out" if image.startswith("data:") else "send the encoded file"
        raise ImageError(f"The image is not valid base64; {hint}.") from error
    return open_image(data, limits=limits)


def bos_prefix(tokenizer: Any) -> list[int]:
    """`[bos]` if the tokenizer puts one in front of every text, else nothing; a BOS in the template does not count."""
    ids = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = ..., return_tensors: None = ...
) -> list[int]: ...
@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = ..., *, return_tensors: Literal["pt"]
) -> torch.Tensor: ...
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Ids of a prompt, `image_token_index` in place of each `<image>`; each text piece is tokenized alone.

    Returns a list, or an int64 tensor (T,) with `return_tensors="pt"`; another value raises `ValueError`. The BOS
    comes first if and only if the tokenizer adds one, and an empty piece has no tokens (spec/train.md §1.1, T5).
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
        return torch.tensor(ids, dtype=torch.long)  # (T,)
    raise ValueError(f"return_tensors is {return_tensors!r}; give 'pt' for a tensor or leave it out for a list.")


def get_model_name_from_path(model_path: str) -> str:
    """Last path component; `<previous>_<last>` when that is a `checkpoint-N` inside another directory."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:])


class KeywordsStoppingCriteria:
    """Stops generation when every row of the batch has produced a keyword (spec/train.md §1.4, T8).

    A keyword is found in the decoded text of the whole generated part, so its tokenization does not matter; one that
    is a single special token, which decoding hides, is found by its id. `None` and empty keywords never match.
    """

    def __init__(self, keywords: Sequence[str | None], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        special = {str(token): token_id for token, token_id in tokenizer.get_added_vocab().items()}
        special.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        self.keyword_ids = {special[keyword] for keyword in self.keywords if keyword in special}
        self._done = [False] * input_ids.shape[0]

    def __call__(self, output_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        """`output_ids` (B, T) holds prompts and what was generated so far; true once all B rows have stopped."""
        rows = output_ids[:, self.start_len :].tolist()  # (B, generated)
        if len(rows) != len(self._done):  # beams, or a batch other than announced: no row has stopped yet
            self._done = [False] * len(rows)
        self._done = [done or self._found(row) for done, row in zip(self._done, rows)]
        return all(self._done)

    def _found(self, ids: list[int]) -> bool:
        if not self.keyword_ids.isdisjoint(ids):
            return True
        text = self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return any(keyword in text for keyword in self.keywords)
