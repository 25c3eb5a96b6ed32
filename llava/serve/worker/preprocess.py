"""Preprocessing of requests outside the engine's thread: token ids and pixel values."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from PIL import Image
from torch import Tensor

from llava.engine.cache import LRUCache
from llava.engine.sequence import HashedImage, ImageInput, hash_image
from llava.errors import ContextLengthError
from llava.images import SERVED
from llava.mm_utils import encode_prompt, load_image_from_base64

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
