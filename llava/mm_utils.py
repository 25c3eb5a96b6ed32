"""Multimodal helpers under their published names: prompt ids, images from base64, model names, stopping criteria."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import ImageError
from llava.images import DEFAULT, ImageLimits, open_image
from llava.images import expand2square as expand2square
from llava.images import process_images as process_images

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase


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
