"""Images of a benchmark: where they are, and loading and preprocessing them in worker processes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from llava.engine.sequence import HashedImage, hash_image
from llava.errors import ImageError, LlavaError
from llava.eval.run.questions import Question
from llava.images import open_image
from llava.utils import usable_cores

Loaded = Sequence[Image.Image | HashedImage] | LlavaError
Preprocess = Callable[[Image.Image], torch.Tensor]
_Packed = list[tuple[bytes, np.ndarray]]  # digest and pixels (3, S, S) float32 of each image

_PER_WORKER = 8  # pictures that make another process worth its start
_AHEAD = 4  # questions' pictures that a worker holds ready


class ImageSource(Protocol):
    """Where the names in `Question.images` lead; `ImageError` for one that leads nowhere."""

    def open(self, name: str) -> Image.Image:
        """The picture in RGB, upright."""

    def read(self, name: str) -> bytes:
        """The picture's file."""


@dataclass(frozen=True)
class ImageFolder:
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
class Base64Images:
    """Names are keys of base64 texts, as in the tables of MMBench."""

    texts: Mapping[str, str]

    def open(self, name: str) -> Image.Image:
        return open_image(self.read(name))

    def read(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.texts[name], validate=True)
        except (KeyError, binascii.Error) as error:
            raise ImageError(f"Cannot read image {name[:40]!r}: it is not base64 ({error}).") from error


def opened(source: ImageSource, names: Sequence[str]) -> Loaded:
    """A question's pictures, or why one of them cannot be opened."""
    try:
        return [source.open(name) for name in names]
    except LlavaError as error:
        return error


class _Pictures:
    """Dataset of each question's images, optionally preprocessed.

    Workers send arrays through a pipe, since shared memory in containers is 64 MB by default (+0.5 ms per image).
    """

    def __init__(
        self, source: ImageSource, names: Sequence[Sequence[str]], preprocess: Preprocess | None = None
    ) -> None:
        self.source, self.names, self.preprocess = source, names, preprocess

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Loaded | _Packed:
        images = opened(self.source, self.names[index])
        if self.preprocess is None or isinstance(images, LlavaError):
            return images
        try:
            pixels = [self.preprocess(image) for image in images if isinstance(image, Image.Image)]
        except LlavaError as error:
            return error
        return [(hash_image(tensor).digest, tensor.numpy()) for tensor in pixels]


def _as_it_is(item: Any) -> Any:
    return item


def _unpacked(item: Any) -> Loaded:
    """Rebuild images from a worker; the digest travels with the pixels."""
    if isinstance(item, LlavaError):
        return item
    return [HashedImage(digest, torch.from_numpy(array)) for digest, array in item]


def prefetch(
    questions: Sequence[Question],
    order: Iterable[int],
    source: ImageSource,
    workers: int,
    preprocess: Preprocess | None = None,
) -> Iterator[tuple[int, Loaded]]:
    """Yield (position, images) in `order`; consecutive questions with equal images load them once.

    At most `workers` processes (none for a handful of images) stay a few images ahead of the consumer. With
    `preprocess` they return pixels; without workers, images are preprocessed where they are used.
    """
    groups = [(names, list(found)) for names, found in groupby(order, key=lambda at: questions[at].images)]
    loader = _loader(source, [names for names, _ in groups], workers, preprocess)
    for (_, positions), images in zip(groups, loader, strict=True):
        for position in positions:
            yield position, images


def _loader(
    source: ImageSource, names: Sequence[Sequence[str]], workers: int, preprocess: Preprocess | None
) -> Iterable[Loaded]:
    pictures: Any = _Pictures(source, names, preprocess)
    workers = min(workers, usable_cores(), len(pictures) // _PER_WORKER)
    if workers < 1:
        return (opened(source, question) for question in names)
    from torch.utils.data import DataLoader

    loader: Iterable[Loaded] = DataLoader(
        pictures, batch_size=None, num_workers=workers, prefetch_factor=_AHEAD, collate_fn=_as_it_is
    )
    return loader if preprocess is None else map(_unpacked, loader)
