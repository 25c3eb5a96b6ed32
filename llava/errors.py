"""Exceptions of the package. A message states the faulty value, what was expected, and the remedy.

``str(error)`` ends with the class's stable ``code`` in brackets, which the troubleshooting page lists.
"""

from __future__ import annotations

from typing import ClassVar


def shorten(value: object, length: int = 60) -> str:
    """Text of a value for a message, on one line; one longer than `length` is cut and followed by its length."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def one_line(value: object, length: int) -> str:
    """As `shorten`, with each run of white space replaced by a space."""
    return shorten(" ".join(str(value).split()), length)


class LlavaError(Exception):
    """Base class of the package's errors."""

    code: ClassVar[str] = "LLAVA"

    def __str__(self) -> str:
        return f"{super().__str__()} [{self.code}]"


class ConfigError(LlavaError, ValueError):
    """Invalid flag or configuration value."""

    code = "CONFIG"


class CheckpointError(LlavaError):
    """Missing, damaged or unexpected checkpoint."""

    code = "CHECKPOINT"


class TemplateError(LlavaError, ValueError):
    """Unknown conversation template, or one that does not fit the tokenizer or the messages."""

    code = "TEMPLATE"


class DataError(LlavaError, ValueError):
    """Invalid annotation file or record."""

    code = "DATA"


class ImageError(DataError):
    """Image that cannot be decoded or exceeds a limit."""

    code = "IMAGE"


class TrainingError(LlavaError, RuntimeError):
    """Training that cannot continue: no trainable parameters, a non-finite loss, no valid checkpoint."""

    code = "TRAINING"


class RequestError(LlavaError, ValueError):
    """Invalid generation request: too long, wrong number of images, invalid parameter."""

    code = "REQUEST"


class ContextLengthError(RequestError):
    """Prompt of `prompt_tokens`, `image_tokens` among them, that leaves no room for an answer in `context_length`."""

    def __init__(self, message: str, *, prompt_tokens: int, image_tokens: int, context_length: int) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.image_tokens = image_tokens
        self.context_length = context_length


class ImageCountError(RequestError):
    """Prompt whose image placeholders differ in number from its images."""


class DependencyError(LlavaError, ImportError):
    """Missing or broken optional package; the message names the extra that installs it."""

    code = "DEPENDENCY"
