"""What a worker does with a request, whichever engine is behind it: the answer's pieces, and how to abandon it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from llava.serve.common.protocol import FinishReason, GenerateBody, ModelInfo, State


@dataclass(frozen=True)
class Piece:
    """New text; empty while waiting. The last piece has a finish reason and the token counts."""

    text: str = ""
    finish_reason: FinishReason | None = None
    usage: dict[str, int] = field(default_factory=dict)
    position: int | None = None  # requests ahead of this one, while it waits


@dataclass(frozen=True)
class Answer:
    """A request on its way. `pieces` raises `ServeError` when it fails; `close` may be called at any time."""

    pieces: AsyncGenerator[Piece, None]
    close: Callable[[], None]


class Backend(Protocol):
    """An engine as the worker's routes see it."""

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
        """While loading, percent of the weights that has been read; None where that is not known."""

    async def start(self, on_change: Callable[[], None]) -> None:
        """Load or connect in the background; `on_change` after every change of `state` and `progress`."""

    async def open(self, body: GenerateBody) -> Answer:
        """Admit and check a request; raises `ServeError` before anything is streamed."""

    async def stop(self) -> None: ...
