"""What a request needs before its turn in the batch, done in other threads than the engine's: token ids and pixels."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from PIL import Image
from torch import Tensor

from llava.engine.cache import LRUCache
from llava.engine.sequence import HashedImage, ImageInput, hash_image
from llava.errors import ContextLengthError
from llava.images import ImageLimits
from llava.mm_utils import load_image_from_base64, tokenizer_image_token

IMAGE_LIMITS: Final = ImageLimits(
    max_bytes=20 * 2**20, max_pixels=2**25, max_side=16_384, max_aspect=200, formats=("JPEG", "PNG", "WEBP")
)
_KEPT_BYTES: Final = 64 * 2**20


class Pictures:
    """From base64 to what the tower takes, which is small however large a picture was sent.

    What was sent before is not decoded again: every turn of a conversation sends its pictures anew.
    """

    def __init__(self, pixels: Callable[[Image.Image], ImageInput]) -> None:
        self._pixels = pixels
        self._kept = LRUCache(_KEPT_BYTES)
        self._lock = threading.Lock()

    def __call__(self, image: str) -> ImageInput | HashedImage:
        """Raises `ImageError`."""
        key = hashlib.blake2b(image.encode(errors="surrogatepass")).digest()
        with self._lock:
            known = self._kept.get(key)
        if known is not None:
            return hash_image(known)
        made = self._pixels(load_image_from_base64(image, IMAGE_LIMITS))
        if not isinstance(made, Tensor):
            return made
        with self._lock:
            self._kept.put(key, made)
        return hash_image(made)


def tokenizer_for(engine: Any) -> Callable[[str], Sequence[int]]:
    """Token ids of a prompt. One that cannot fit raises `ContextLengthError` at once: its ids would take minutes."""
    context, longest = (
        engine.model_runner.context_length,
        max(map(len, engine.tokenizer.get_vocab())),
    )  # characters of a token
    engine.tokenizer("")  # a fast one settles its padding at the first call, where threads must not meet

    def tokenize(text: str) -> Sequence[int]:
        least = len(text) // longest
        if least > context:
            raise ContextLengthError(
                f"The prompt has {len(text)} characters, so at least {least} tokens, and the model's context holds "
                f"{context} with the answer; shorten the conversation.",
                prompt_tokens=least,
                image_tokens=0,
                context_length=context,
            )
        return tokenizer_image_token(text, engine.tokenizer)

    return tokenize
