"""Preprocessing of requests outside the engine's thread: token ids and pixel values."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

from PIL import Image
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.engine.cache import LRUCache
from llava.engine.sequence import HashedImage, ImageInput, hash_image
from llava.errors import ContextLengthError, RequestError
from llava.images import SERVED
from llava.mm_utils import bos_prefix, encode_prompt, load_image_from_base64

if TYPE_CHECKING:
    from llava.engine import Engine

_CACHE_BYTES: Final = 64 * 2**20


class ImagePreprocessor:
    """Converts base64 images to the vision tower's input.

    An LRU cache by content avoids decoding an image again, since every turn of a conversation resends its images.
    """

    def __init__(self, pixels: Callable[[Image.Image], ImageInput]) -> None:
        self._pixels = pixels
        self._cache = LRUCache(_CACHE_BYTES)
        self._lock = threading.Lock()

    def __call__(self, encoded: str) -> ImageInput | HashedImage:
        """Decode and preprocess a base64 image; raises `ImageError`."""
        key = hashlib.blake2b(encoded.encode(errors="surrogatepass")).digest()
        with self._lock:
            cached = self._cache.get(key)
        if cached is not None:
            return hash_image(cached)
        image_input = self._pixels(load_image_from_base64(encoded, SERVED))
        if not isinstance(image_input, Tensor):
            return image_input
        with self._lock:
            self._cache.put(key, image_input)
        return hash_image(image_input)


def tokenizer_for(engine: Engine) -> Callable[[str], Sequence[int]]:
    """Thread-safe function from a prompt to token ids.

    A prompt too long for the context at any tokenization raises `ContextLengthError` without being tokenized, which
    would take minutes.
    """
    context = engine.model_runner.context_length
    longest = max(map(len, engine.tokenizer.get_vocab()))  # characters per token
    engine.tokenizer("")  # the first call of a fast tokenizer sets its padding, which is not thread-safe

    def tokenize(text: str) -> Sequence[int]:
        least = len(text) // longest
        if least > context:
            raise ContextLengthError(
                f"The prompt has {len(text)} characters, at least {least} tokens, but the context length is {context}; "
                "shorten the conversation.",
                prompt_tokens=least,
                image_tokens=0,
                context_length=context,
            )
        return encode_prompt(text, engine.tokenizer)

    return tokenize


class Vocabulary:
    """Token ids of prompts as the engine reads them, and the text of token ids; -200 stands for an image."""

    def __init__(self, engine: Engine) -> None:
        self._encode = tokenizer_for(engine)
        self._tokenizer = engine.tokenizer
        self._size = len(engine.tokenizer)

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt; raises `RequestError`."""
        ids = list(self._encode(prompt))
        return ids if add_special_tokens else ids[len(bos_prefix(self._tokenizer)) :]

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id."""
        return [DEFAULT_IMAGE_TOKEN if i < 0 else self._tokenizer.convert_ids_to_tokens(i) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with special tokens; raises `RequestError` for an id outside the vocabulary."""
        unknown = [i for i in ids if i != IMAGE_TOKEN_INDEX and not 0 <= i < self._size]
        if unknown:
            raise RequestError(f"tokens must be in [0, {self._size - 1}], or -200 for an image, got {unknown[0]}.")
        text = ""
        for is_image, run in groupby(ids, lambda i: i < 0):
            group = list(run)
            if is_image:
                text += DEFAULT_IMAGE_TOKEN * len(group)
            else:
                text += self._tokenizer.decode(group, clean_up_tokenization_spaces=False)
        return text
