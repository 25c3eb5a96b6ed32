"""What goes into the engine and what comes out: sampling parameters, requests, completions and the handle between."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Final, Literal

import torch
from PIL import Image

from llava.conversation import Conversation, with_image_token
from llava.errors import RequestError

ImageInput = Image.Image | torch.Tensor


@dataclass(frozen=True)
class Picture:
    """An input picture and the digest of its content; two pictures with equal digests have equal features."""

    digest: bytes
    content: ImageInput


def identify(image: ImageInput | Picture) -> Picture:
    """Name a picture by its content: size, kind and every pixel. Whoever asks often about one does it once.

    Raises `RequestError` for what is neither a PIL image nor a tensor (3, S, S).
    """
    if isinstance(image, Picture):
        return image
    if not isinstance(image, Image.Image) and not (isinstance(image, torch.Tensor) and image.shape[:-2] == (3,)):
        found = f"a tensor {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise RequestError(
            f"An image of the request is {found}; give a PIL image (llava.images.open_image opens a file) or a "
            "preprocessed tensor (3, S, S)."
        )
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, Image.Image):
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    else:
        digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
        digest.update(image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return Picture(digest.digest(), image)


# --- Requests, their handles and completions -------------------------------------------------------------------------


FinishReason = Literal["stop", "length", "cancelled", "error"]

_KINDS: Final[tuple[tuple[type, str, tuple[str, ...]], ...]] = (
    (Integral, "a whole number", ("max_new_tokens", "num_beams", "seed")),
    (Real, "a number", ("temperature", "top_p")),
)


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is decoded.

    `temperature` 0 is greedy. `seed` makes a sampled answer reproducible whatever else shares the batch.
    `num_beams` above 1 runs alone, through the library's beam search, and streams only its final text.
    Raises `RequestError` for a value that cannot be honoured.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1

    def __post_init__(self) -> None:
        for kind, wanted, names in _KINDS:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) and not (name == "seed" and value is None):
                    raise RequestError(f"{name} is {value!r}; it must be {wanted}.")
        stop: object = self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) for text in stop):
            raise RequestError(f"stop is {stop!r}; give a tuple of strings.")
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise RequestError(f"temperature is {self.temperature}; it must lie in [0, 100] (0 decodes greedily).")
        if not 0.0 < self.top_p <= 1.0:  # also refuses NaN
            raise RequestError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; it must lie in [0, 2^63).")
        if self.num_beams < 1:
            raise RequestError(f"num_beams is {self.num_beams}; it must be at least 1.")


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """A rendered prompt with one `<image>` per picture (or its token ids with -200), and how to decode.

    A picture is a PIL image, preprocessed by the engine, or a ready float tensor (3, S, S), or what `identify` made of
    one. `keep` stores what was
    computed, within the engine's budget, so that the next turn of the conversation starts behind this one.
    """

    prompt: str | Sequence[int]
    images: Sequence[ImageInput | Picture] = ()
    params: SamplingParams = GREEDY
    keep: bool = True


@dataclass(frozen=True)
class Completion:
    """One answer. `text` is cleaned (spec/eval.md §1.5): no special tokens, cut at the first stop string, stripped.

    `token_ids` are the new tokens as generated, the end token included; `prompt_tokens` counts image tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    error: str | None = None


@dataclass(frozen=True)
class Statistics:
    """What an engine has done since it was made, in tokens, and what it holds now, in bytes."""

    generated_tokens: int
    computed_tokens: int  # of prompts, through the model
    shared_tokens: int  # of prompts, that needed no computing for their own sake
    encoded_images: int
    running: int
    waiting: int
    row_bytes: int  # keys and values of the running rows
    prefix_bytes: int  # stored beginnings
    feature_bytes: int  # stored image features


@dataclass(eq=False)
class RequestHandle:
    """A submitted request: iterate it for text as it comes, or ask for `result()`; both drive the engine meanwhile."""

    drive: Callable[[], bool]
    prompt_tokens: int
    completion: Completion | None = None
    cancelled: bool = False
    _pieces: deque[str] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return self.completion is not None

    def cancel(self) -> None:
        """Stop this request at the engine's next step; what was generated so far is kept."""
        self.cancelled = True

    def push(self, text: str) -> None:
        """Engine side: hand over new text."""
        if text:
            self._pieces.append(text)

    def take(self) -> str:
        """The text that came since the last call, without waiting (for callers that drive the engine themselves)."""
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        return "".join(pieces)

    def __iter__(self) -> Iterator[str]:
        while True:
            piece = self.take()
            if piece:
                yield piece
            elif self.done:
                return
            else:
                self.drive()

    def result(self) -> Completion:
        """The finished answer, driving the engine until it is there."""
        while self.completion is None:
            self.drive()
        return self.completion


# --- From a question and its pictures to a rendered prompt: a single turn, the answer left open -----------------------


def render_question(template: Conversation, text: str, images: int, config: Any) -> str:
    """The prompt of a single-turn question (spec/eval.md §1.3); `template` stays as it is."""
    conversation = template.copy()
    question = with_image_token(text, template, config, images) if images else text
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
