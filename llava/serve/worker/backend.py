"""Interface between a worker and the engine behind it: deltas of an answer, a running generation, and the backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.statistics import Statistics
from llava.serve.common.protocol import (
    DetokenizeBody,
    ErrorType,
    FinishReason,
    GenerateBody,
    ModelInfo,
    ServeError,
    State,
    TokenizeBody,
    TokenLogprob,
)


@dataclass(frozen=True)
class Delta:
    """New text of a choice, empty while waiting. Its last delta has a finish reason and the token counts, which include
    the prompt for choice 0 only."""

    text: str = ""
    finish_reason: FinishReason | None = None
    usage: dict[str, int] = field(default_factory=dict)
    queue_position: int | None = None  # requests ahead of this one, while it waits
    index: int = 0
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Generation:
    """A running request. `deltas` raises `ServeError` when it fails; `close` may be called at any time."""

    deltas: AsyncGenerator[Delta, None]
    close: Callable[[], None]


class Backend(Protocol):
    """An engine as seen by the routes of a worker."""

    @property
    def features(self) -> list[str]: ...

    @property
    def state(self) -> State: ...

    @property
    def in_use(self) -> int:
        """Requests running or waiting."""

    @property
    def running(self) -> int: ...

    @property
    def info(self) -> ModelInfo | None: ...

    @property
    def progress(self) -> int | None:
        """Percent of the weights loaded, None when unknown."""

    def statistics(self) -> Statistics | None:
        """Statistics of the engine; None without an engine in this process."""

    async def start(self, on_change: Callable[[], None]) -> None:
        """Load or connect in the background; `on_change` is called after every change of `state` and `progress`."""

    async def open(self, body: GenerateBody) -> Generation:
        """Admit and validate a request; raises `ServeError` before anything is streamed."""

    def tokenize(self, body: TokenizeBody) -> dict[str, object]:
        """The reply of `/worker_tokenize`. Thread-safe; raises `ServeError`, also when the engine has no tokenizer."""

    def detokenize(self, body: DetokenizeBody) -> dict[str, object]:
        """The reply of `/worker_detokenize`, like `tokenize`."""

    async def stop(self) -> None: ...


def check_image_count(placeholders: int, images: int, max_images: int) -> None:
    """Raise `ServeError` (400) unless a request has one image per placeholder and at most `max_images`."""
    if placeholders != images:
        raise ServeError(
            ErrorType.IMAGE_COUNT_MISMATCH,
            f"The prompt has {placeholders} {DEFAULT_IMAGE_TOKEN} placeholder(s) but the request has {images} "
            "image(s); send one image per placeholder.",
            placeholders=placeholders,
            images=images,
        )
    if images > max_images:
        raise ServeError(
            ErrorType.BAD_REQUEST, f"The request has {images} images; this model accepts at most {max_images}."
        )
