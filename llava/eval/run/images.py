"""Image sources of benchmarks, and a prefetcher that loads and preprocesses images in worker processes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llava.errors import ImageError, LlavaError
from llava.eval.run.questions import Question
from llava.utils import usable_cores

if TYPE_CHECKING:  # scoring programs import this module and must not load torch
    import numpy as np
    import torch
    from PIL import Image

    from llava.engine.sequence import HashedImage

    Loaded = Sequence[Image.Image | HashedImage] | LlavaError
    Preprocess = Callable[[Image.Image], torch.Tensor]
    # images; or digests, pixels (3, S, S) float32, and widths and heights before preprocessing
    Packed = Sequence[Image.Image | tuple[bytes, np.ndarray, tuple[int, int]]]

_IMAGES_PER_WORKER = 8  # fewer images do not pay for another process
_PREFETCH = 4  # questions per worker whose images are ready in advance


class ImageSource(Protocol):
    """Maps the names in `Question.images` to images. Raises `ImageError` for an unknown name."""

    def open(self, name: str) -> Image.Image:
        """The image in RGB, with its EXIF orientation applied."""

    def read(self, name: str) -> bytes:
        """The content of the image file."""


@dataclass(frozen=True)
class ImageFolder:
    """Image source whose names are paths relative to a directory."""

    path: Path

    def open(self, name: str) -> Image.Image:
        from llava.images import open_image

        return open_image(self.path / name)

    def read(self, name: str) -> bytes:
        from llava.images import read_image_file

        return read_image_file(self.path / name)


@dataclass(frozen=True)
class Base64Images:
    """Image source of base64 strings by name, as in the tables of MMBench."""

    texts: Mapping[str, str]

    def open(self, name: str) -> Image.Image:
        from llava.images import open_image

        return open_image(self.read(name))

    def read(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.texts[name], validate=True)
        except (KeyError, binascii.Error) as error:
            raise ImageError(f"Cannot read image {name[:40]!r}: it is not base64 ({error}).") from error


class _ImageDataset:
    """Dataset of the images of each question, preprocessed if a function is given.

    Preprocessed images are arrays, which workers send through a pipe: shared memory in containers is 64 MB by default
    (the pipe costs 0.5 ms per image).
    """

    def __init__(
        self, source: ImageSource, names: Sequence[Sequence[str]], preprocess: Preprocess | None = None
    ) -> None:
        self.source, self.names, self.preprocess = source, names, preprocess

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Packed | LlavaError:
        from llava.engine.sequence import hash_image

        try:
            images = [self.source.open(name) for name in self.names[index]]
            if self.preprocess is None:
                return images
            pixels = map(self.preprocess, images)
            return [(hash_image(each).digest, each.numpy(), image.size) for each, image in zip(pixels, images)]
        except LlavaError as error:
            return error


def _unbatched(item: Packed | LlavaError) -> Packed | LlavaError:
    """Collate function that leaves an item unchanged."""
    return item


def _unpack(item: Packed | LlavaError) -> Loaded:
    """Convert the arrays of a worker back to tensors; digest and size come with the pixels."""
    import torch

    from llava.engine.sequence import HashedImage

    if isinstance(item, LlavaError):
        return item
    return [
        HashedImage(each[0], torch.from_numpy(each[1]), each[2]) if isinstance(each, tuple) else each for each in item
    ]


def prefetch(
    questions: Sequence[Question],
    order: Iterable[int],
    source: ImageSource,
    workers: int,
    preprocess: Preprocess | None = None,
) -> Iterator[tuple[int, Loaded]]:
    """Yield (position, images or error) in `order`; consecutive questions with equal images load them once.

    Up to `workers` processes load images a few questions ahead and apply `preprocess`. A handful of images is loaded in
    this process instead, without `preprocess`.
    """
    groups = [(names, list(positions)) for names, positions in groupby(order, key=lambda at: questions[at].images)]
    loader = _loader(source, [names for names, _ in groups], workers, preprocess)
    for (_, positions), images in zip(groups, loader, strict=True):
        for position in positions:
            yield position, images


def _loader(
    source: ImageSource, names: Sequence[Sequence[str]], workers: int, preprocess: Preprocess | None
) -> Iterator[Loaded]:
    workers = min(workers, usable_cores(), len(names) // _IMAGES_PER_WORKER)
    if workers < 1:
        images = _ImageDataset(source, names)
        return map(_unpack, (images[index] for index in range(len(images))))
    from torch.utils.data import DataLoader

    dataset = _ImageDataset(source, names, preprocess)
    loader: Iterable[Packed | LlavaError] = DataLoader(
        dataset,  # type: ignore[arg-type]  # a map-style dataset by its methods
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        collate_fn=_unbatched,
    )
    return map(_unpack, loader)
