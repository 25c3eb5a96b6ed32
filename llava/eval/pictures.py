"""Pictures of a benchmark: where they are, and opening them in worker processes ahead of the model."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from llava.data.images import open_image
from llava.errors import ImageError, LlavaError
from llava.eval.questions import Question

Loaded = list[Image.Image] | LlavaError

_PER_WORKER = 8  # pictures that make another process worth its start
_AHEAD = 4  # questions' pictures that a worker holds ready


class PictureSource(Protocol):
    """Where the names in `Question.images` lead; `ImageError` for one that leads nowhere."""

    def open(self, name: str) -> Image.Image:
        """The picture in RGB, upright."""

    def read(self, name: str) -> bytes:
        """The picture's file."""


@dataclass(frozen=True)
class Folder:
    """Names are paths below a folder."""

    path: Path

    def open(self, name: str) -> Image.Image:
        return open_image(self.path / name)

    def read(self, name: str) -> bytes:
        path = self.path / name
        if not path.is_file():
            raise ImageError(f"Cannot read image {path}: there is no such file.")
        return path.read_bytes()


@dataclass(frozen=True)
class Cells:
    """Names are keys of base64 texts, as in the tables of MMBench."""

    texts: Mapping[str, str]

    def open(self, name: str) -> Image.Image:
        return open_image(self.read(name))

    def read(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.texts[name], validate=True)
        except (KeyError, binascii.Error) as error:
            raise ImageError(f"Cannot read image {name[:40]!r}: it is not base64 ({error}).") from error


def opened(source: PictureSource, names: Sequence[str]) -> Loaded:
    """A question's pictures, or why one of them cannot be opened."""
    try:
        return [source.open(name) for name in names]
    except LlavaError as error:
        return error


class _Pictures:
    """What torch's loader iterates: the pictures of one question after the other."""

    def __init__(self, source: PictureSource, names: Sequence[Sequence[str]]) -> None:
        self.source, self.names = source, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Loaded:
        return opened(self.source, self.names[index])


def _as_it_is(item: Loaded) -> Loaded:
    return item


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(
    questions: Sequence[Question], order: Iterable[int], source: PictureSource, workers: int
) -> Iterator[tuple[int, Loaded]]:
    """Yield (position, pictures) in `order`; neighbours with equal pictures share one opening.

    At most `workers` processes (none for a handful of pictures) stay a few pictures ahead of whoever consumes this.
    """
    groups = [(names, list(found)) for names, found in groupby(order, key=lambda at: questions[at].images)]
    for (_, positions), images in zip(groups, _loader(source, [names for names, _ in groups], workers), strict=True):
        for position in positions:
            yield position, images


def _loader(source: PictureSource, names: Sequence[Sequence[str]], workers: int) -> Iterable[Loaded]:
    pictures: Any = _Pictures(source, names)
    workers = min(workers, usable_cores(), len(pictures) // _PER_WORKER)
    if workers < 1:
        return (pictures[index] for index in range(len(pictures)))
    from torch.utils.data import DataLoader

    return DataLoader(
        pictures, batch_size=None, num_workers=workers, prefetch_factor=_AHEAD, collate_fn=_as_it_is
    )  # fmt: skip
