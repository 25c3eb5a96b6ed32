"""Uploaded images: validation, size limits, preprocessing modes and encoding."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from llava.errors import ImageError
from llava.images import PROCESS_MODES, is_plain, open_image, process_upload

MAX_IMAGES: Final = 8
_MAX_SIDE: Final = 2048
_REDUCED_SIDE: Final = 1024
_MAX_BYTES: Final = 2 * 2**20
_SENT_FORMATS: Final = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class UploadedImage:
    """An upload: the encoded file sent to workers, and the path of the file shown in the browser."""

    data: bytes
    path: str

    def decode(self) -> Image.Image:
        """The image in RGB."""
        return open_image(self.data)

    def data_uri(self, max_bytes: int | None = None) -> str:
        """The file as a data URI; files of more than `max_bytes` become JPEG of at most 1024 pixels a side."""
        data = self.data
        if max_bytes is not None and len(data) > max_bytes:
            image = self.decode()
            image.thumbnail((_REDUCED_SIDE, _REDUCED_SIDE), Image.Resampling.LANCZOS)
            data = _encode(image, "JPEG", quality=85)
        kind = Image.open(io.BytesIO(data)).get_format_mimetype()
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def encode(self, mode: str) -> str:
        """Base64 of the file sent to workers; `mode` is one of `PROCESS_MODES`.

        `Default` sends the upload as is, to be preprocessed as in the other programs; `Crop` keeps the central square,
        `Pad` pads to a square and `Resize` stretches to 336 x 336.
        """
        if mode not in PROCESS_MODES:
            raise ImageError(f"Unknown preprocess mode {mode!r}; must be one of {', '.join(PROCESS_MODES)}.")
        return base64.b64encode(
            self.data if mode == "Default" else _encode(process_upload(self.decode(), mode), "PNG")
        ).decode()


def load_images(paths: Sequence[str]) -> tuple[UploadedImage, ...]:
    """Load uploaded files; `ImageError` when one cannot be read or there are too many."""
    if len(paths) > MAX_IMAGES:
        raise ImageError(f"A message may have at most {MAX_IMAGES} images, got {len(paths)}.")
    return tuple(load_image(path) for path in paths)


def load_image(path: str) -> UploadedImage:
    """Load an uploaded file; large files and all but opaque JPEG, PNG and WebP files are re-encoded."""
    try:
        image = open_image(path)
    except ImageError as error:  # visitors see the name of their file, not where the server keeps it
        raise ImageError(str(error.args[0]).replace(path, Path(path).name)) from error
    data = Path(path).read_bytes()
    kind = Image.open(io.BytesIO(data)).format
    if not is_plain(data) or max(image.size) > _MAX_SIDE or len(data) > _MAX_BYTES:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        data = _encode(image, "PNG")
        if len(data) > _MAX_BYTES:
            data = _encode(image, "JPEG")
    if kind not in _SENT_FORMATS:  # browsers display neither TIFF nor PPM
        displayed = Path(path).with_name(f"{Path(path).stem}-shown.png")
        displayed.write_bytes(data)
        path = str(displayed)
    return UploadedImage(data, path)


def as_jpeg(image: UploadedImage) -> bytes:
    """The image as JPEG without the metadata of the upload, for the log."""
    return _encode(image.decode(), "JPEG")


def _encode(image: Image.Image, kind: str, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()
