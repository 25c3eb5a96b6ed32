"""The exception tree. Every message is one sentence or two: what was found, what was expected, what to do next.

``code`` is stable, so that the troubleshooting page can be searched by it; ``str(error)`` ends with it in brackets.
"""

from __future__ import annotations

from typing import ClassVar


class LlavaError(Exception):
    """Base of every error this package raises on purpose."""

    code: ClassVar[str] = "LLAVA"

    def __str__(self) -> str:
        return f"{super().__str__()} [{self.code}]"


class ConfigError(LlavaError, ValueError):
    """A flag or a configuration value that cannot be honoured."""

    code = "CONFIG"


class CheckpointError(LlavaError):
    """A directory or file of weights that is not what was asked for."""

    code = "CHECKPOINT"


class TemplateError(LlavaError, ValueError):
    """A conversation template that is unknown, or does not fit the tokenizer or the messages."""

    code = "TEMPLATE"


class DataError(LlavaError, ValueError):
    """An annotation record that cannot be used as it is."""

    code = "DATA"


class ImageError(DataError):
    """An image that cannot be opened, or exceeds a limit."""

    code = "IMAGE"


class TrainingError(LlavaError, RuntimeError):
    """A run that must not go on: nothing trainable, loss not finite, no valid checkpoint."""

    code = "TRAINING"


class RequestError(LlavaError, ValueError):
    """A generation request that cannot be served: too long, wrong number of images, bad parameter."""

    code = "REQUEST"


class ContextLengthError(RequestError):
    """A prompt that leaves no room for an answer: `prompt_tokens`, of them `image_tokens`, in `context_length`."""

    def __init__(self, message: str, *, prompt_tokens: int, image_tokens: int, context_length: int) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.image_tokens = image_tokens
        self.context_length = context_length


class ImageCountError(RequestError):
    """A prompt with more or fewer image placeholders than images."""


class DependencyError(LlavaError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""

    code = "DEPENDENCY"
