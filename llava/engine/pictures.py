"""Pictures as requests bring them, named by their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from PIL import Image

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
            f"An image of the request is {found}; give a PIL image (llava.data.images.open_image opens a file) or a "
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
