"""Pictures of a chat in the browser: opened once by the one guard, sent once, no larger than a tower can use."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from llava.errors import ImageError
from llava.images import PROCESS_MODES, open_image, process_upload

MAX_PICTURES: Final = 8
_MAX_SIDE: Final = 2048
_MAX_BYTES: Final = 2 * 2**20
_ON_THE_WIRE: Final = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class Picture:
    """An upload: the encoded file that workers get, and where the browser finds something to show."""

    data: bytes
    shown: str

    def image(self) -> Image.Image:
        """The RGB picture."""
        return open_image(self.data)

    def uri(self) -> str:
        """The file as a data URI."""
        kind = Image.open(io.BytesIO(self.data)).get_format_mimetype()
        return f"data:{kind};base64,{base64.b64encode(self.data).decode()}"

    def sent(self, mode: str) -> str:
        """Base64 of the file that a worker gets; `mode` is one of `PROCESS_MODES` (spec/serve.md §8.5).

        `Default` is the upload itself, so that it is preprocessed exactly as by the other programs; `Crop` keeps the
        middle square, `Pad` puts it on a square canvas and `Resize` stretches it to 336 x 336.
        """
        if mode not in PROCESS_MODES:
            raise ImageError(f"Unknown preprocess mode {mode!r}; choose one of {', '.join(PROCESS_MODES)}.")
        return base64.b64encode(self.data if mode == "Default" else _png(process_upload(self.image(), mode))).decode()


def load_pictures(paths: Sequence[str]) -> tuple[Picture, ...]:
    """The pictures in uploaded files; `ImageError` when one cannot be read or there are too many."""
    if len(paths) > MAX_PICTURES:
        raise ImageError(f"{len(paths)} pictures were given; at most {MAX_PICTURES} go with a message.")
    return tuple(load_picture(path) for path in paths)


def load_picture(path: str) -> Picture:
    """The picture in an uploaded file, its bytes kept as they are unless too large or of a kind not sent."""
    image = open_image(path)  # the guard: limits, damage, formats
    data = Path(path).read_bytes()
    kind = Image.open(io.BytesIO(data)).format
    if kind not in _ON_THE_WIRE or max(image.size) > _MAX_SIDE or len(data) > _MAX_BYTES:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        data = _png(image)
        if len(data) > _MAX_BYTES:
            data = _jpeg(image)
    shown = Path(path)
    if kind not in _ON_THE_WIRE:  # browsers show neither TIFF nor PPM
        shown = shown.with_name(f"{shown.stem}-shown.png")
        shown.write_bytes(data)
    return Picture(data, str(shown))


def as_jpeg(picture: Picture) -> bytes:
    """The picture as the request log stores it: JPEG, without the metadata of the upload."""
    return _jpeg(picture.image())


def _png(image: Image.Image) -> bytes:
    return _encoded(image, "PNG")


def _jpeg(image: Image.Image) -> bytes:
    return _encoded(image, "JPEG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()
