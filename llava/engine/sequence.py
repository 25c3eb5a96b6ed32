"""Requests, completions, and the state of a sequence inside the engine."""

from __future__ import annotations

import hashlib
import math
import time
from collections import abc, deque
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Final, Literal

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.detokenizer import Detokenizer, TextStream
from llava.errors import RequestError
from llava.images import to_rgb

ImageInput = Image.Image | torch.Tensor
FinishReason = Literal["stop", "length", "cancelled", "error"]
CacheKeys = tuple[int, ...]

_IMAGE_KEY: Final = 2**40  # cache keys of images start here, above every token id
_TYPES: Final[tuple[tuple[type, str, tuple[str, ...]], ...]] = (
    (Integral, "an integer", ("max_new_tokens", "num_beams", "seed")),
    (Real, "a number", ("temperature", "top_p")),
)


@dataclass(frozen=True)
class HashedImage:
    """An image with the hash of its content; images with equal digests have equal features."""

    digest: bytes
    content: ImageInput


def hash_image(image: ImageInput | HashedImage) -> HashedImage:
    """Hash an image: its size or dtype and every pixel, of a PIL image in RGB. A `HashedImage` is returned as it is.

    Raises `RequestError` for anything but a PIL image or a tensor (3, S, S), and `ImageError` for a damaged image.
    """
    if isinstance(image, HashedImage):
        return image
    if not isinstance(image, Image.Image) and not (isinstance(image, torch.Tensor) and image.shape[:-2] == (3,)):
        found = f"a tensor {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise RequestError(
            f"An image of the request is {found}; give a PIL image (llava.images.open_image opens a file) or a "
            "preprocessed tensor (3, S, S)."
        )
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, Image.Image):
        image = to_rgb(image)
        digest.update(f"RGB {image.size}".encode())
        digest.update(image.tobytes())
    else:
        digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
        digest.update(image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return HashedImage(digest.digest(), image)


@dataclass(frozen=True)
class SamplingParams:
    """Decoding parameters of one request.

    A `temperature` of 0 decodes greedily. A `seed` makes a sampled answer reproducible, independent of the other
    requests in the batch. `num_beams` above 1 runs beam search outside the batch and streams only the final text.
    Raises `RequestError` for a value out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1

    def __post_init__(self) -> None:
        for kind, wanted, names in _TYPES:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) and not (name == "seed" and value is None):
                    raise RequestError(f"{name} must be {wanted}, got {value!r}.")
        stop: object = self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) for text in stop):
            raise RequestError(f"stop must be a tuple of strings, got {stop!r}.")
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise RequestError(f"temperature must be in [0, 100] (0 decodes greedily), got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:  # also refuses NaN
            raise RequestError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed must be in [0, 2^63), got {self.seed}.")


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """A rendered prompt with one `<image>` per image, or its token ids with -200 per image, and sampling parameters.

    Control tokens are recognized in a string, except in the text of a `RenderedPrompt` (`Conversation.get_prompt`).
    An image is a PIL image, which the engine preprocesses, a preprocessed float tensor (3, S, S), or a `HashedImage`
    of either. With `cache_prefix` the prompt and its answer are stored in the prefix cache, for the next turn of the
    conversation.
    """

    prompt: str | abc.Sequence[int]
    images: abc.Sequence[ImageInput | HashedImage] = ()
    params: SamplingParams = GREEDY
    cache_prefix: bool = True


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    `text` contains no special tokens, ends before the first stop string, and is stripped. `token_ids` are the new
    tokens as generated, including the end token; `prompt_tokens` counts image tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    error: str | None = None


@dataclass(eq=False)
class RequestHandle:
    """A submitted request. Iterate it for text as it is generated, or call `result()`; both drive the engine."""

    drive: abc.Callable[[], bool]
    prompt_tokens: int
    completion: Completion | None = None
    cancelled: bool = False
    _pieces: deque[str] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return self.completion is not None

    def cancel(self) -> None:
        """Stop this request at the engine's next step; its completion holds the tokens generated so far."""
        self.cancelled = True

    def push(self, text: str) -> None:
        """Add generated text; called by the engine."""
        if text:
            self._pieces.append(text)

    def take(self) -> str:
        """Return the text generated since the last call, without driving the engine."""
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        return "".join(pieces)

    def __iter__(self) -> abc.Iterator[str]:
        while True:
            piece = self.take()
            if piece:
                yield piece
            elif self.done:
                return
            else:
                self.drive()

    def result(self) -> Completion:
        """Drive the engine until the request is finished."""
        while self.completion is None:
            self.drive()
        return self.completion


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt; `ids` contain -200 for every image."""

    ids: tuple[int, ...]
    images: tuple[HashedImage, ...]

    @cached_property
    def cache_keys(self) -> CacheKeys:
        """The token ids, with one number derived from the digest for every image."""
        if not self.images:
            return self.ids
        image_keys = iter([_IMAGE_KEY + int.from_bytes(image.digest, "big") for image in self.images])
        return tuple(next(image_keys) if token == IMAGE_TOKEN_INDEX else token for token in self.ids)


def is_image_key(cache_key: int) -> bool:
    """Whether a cache key stands for an image."""
    return cache_key >= _IMAGE_KEY


@dataclass(eq=False)
class Sequence:
    """A request inside the engine: its prompt, generated tokens and output text."""

    prompt: Prompt
    params: SamplingParams
    handle: RequestHandle
    max_new_tokens: int
    end_ids: frozenset[int]
    generator: torch.Generator | None
    detokenizer: Detokenizer
    stream: TextStream
    cache_prefix: bool
    max_tokens: int  # of prompt and answer
    tokens: list[int] = field(default_factory=list)
    detokenized: int = 0  # tokens decoded to text
    submitted: float = field(default_factory=time.perf_counter)

    def append(self, token: int) -> FinishReason | None:
        """Append the next token; return the finish reason if it follows from the token alone."""
        self.tokens.append(token)
        if token in self.end_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None

    def detokenize(self) -> bool:
        """Decode new tokens and push their text to the handle; true if a stop string has ended the answer."""
        for token in self.tokens[self.detokenized :]:
            if token not in self.end_ids and not self.stream.stopped:
                self.handle.push(self.stream.push(self.detokenizer.push(token)))
        self.detokenized = len(self.tokens)
        return self.stream.stopped

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Push the remaining text and set the completion."""
        if self.detokenize() and reason == "length":
            reason = "stop"
        self.handle.push(self.stream.push(self.detokenizer.flush(), final=True))
        self.handle.completion = Completion(
            self.stream.text, tuple(self.tokens), reason, self.handle.prompt_tokens, error
        )
