"""The one image opener and preprocessor: byte, pixel and side limits, every mode to RGB, no canvas of a sliver.

Whatever enters as a file, as bytes or from a URL passes `open_image`; whatever goes to a tower passes
`preprocess_image` (spec/train.md §1.2, with the repairs of T29).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from llava.download import download
from llava.errors import ImageError

_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS: it runs Ghostscript


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be and cost, else it is refused: file bytes, decoded pixels, longer side, long : short side."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64 * 2**20
    max_side: int = 65_535
    max_aspect: float = math.inf
    formats: tuple[str, ...] = _FORMATS


DEFAULT: Final = ImageLimits()
_MAX_CANVAS: Final = 2**26  # pixels of a padded image that may be touched
_MAX_ASPECT: Final = 32  # beyond it, the middle is cut out before the short side is enlarged
_ROWS: Final = 64  # rows of a padded image that exist at a time


def open_image(source: str | Path | bytes | BinaryIO, *, limits: ImageLimits = DEFAULT) -> Image.Image:
    """The RGB image in a file, in bytes or in a binary stream, turned upright by its EXIF orientation.

    Raises `ImageError` for anything that is not a complete image of a known format within `limits`; the size is
    checked before pixels are decoded. The first frame of an animation is taken. URLs are never opened here.
    """
    name = f"image {source}" if isinstance(source, str | Path) else "the given image"
    data = _read(source, name, limits.max_bytes)
    try:
        with Image.open(BytesIO(data), formats=limits.formats) as image:
            _check_size(image, name, limits)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"Cannot read {name}: its content is not {', '.join(limits.formats)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"Cannot read {name}: it decodes to more than {limits.max_pixels} pixels.") from error
    except Exception as error:  # decoders raise every kind of exception on damaged input; this is its only guard
        raise ImageError(f"Cannot read {name}: the file is damaged or incomplete ({error}).") from error


def _read(source: str | Path | bytes | BinaryIO, name: str, max_bytes: int) -> bytes:
    try:
        if isinstance(source, str | Path):
            path = Path(source)
            if not path.is_file():
                raise ImageError(f"Cannot read {name}: there is no such file.")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        else:
            data = source if isinstance(source, bytes) else source.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"Cannot read {name}: {error}.") from error
    if len(data) > max_bytes:
        raise ImageError(f"Cannot read {name}: it has more than {max_bytes} bytes.")
    return data


def _check_size(image: Image.Image, name: str, limits: ImageLimits) -> None:
    if image.width * image.height > limits.max_pixels or max(image.size) > limits.max_side:
        raise ImageError(
            f"Cannot read {name}: it is {image.width}x{image.height}, "
            f"beyond {limits.max_pixels} pixels or a side of {limits.max_side}."
        )
    if max(image.size) > limits.max_aspect * min(image.size):
        raise ImageError(
            f"Cannot read {name}: it is {image.width}x{image.height}, beyond a ratio of {limits.max_aspect:g} to 1."
        )


def fetch_image(
    url: str, *, limits: ImageLimits = DEFAULT, timeout: float = 10.0, unsafe_local: bool = False
) -> Image.Image:
    """The RGB image behind an https URL on a public host; see `llava.download` for what is refused."""
    return open_image(download(url, limits.max_bytes, timeout=timeout, unsafe_local=unsafe_local), limits=limits)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; 16-bit grey is scaled to 8 bits (Pillow would clip it), transparency is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about the transparency
    return image.convert("RGB")


def expand2square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square canvas of its longer side; itself when square.

    An odd remainder goes right or down. Modes other than RGB and RGBA are converted, since `color` has three parts.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side**2 > _MAX_CANVAS:
        raise ImageError(f"A {width}x{height} image needs a {side}x{side} canvas to be padded; scale it down first.")
    image = image if image.mode in ("RGB", "RGBA") else to_rgb(image)
    canvas = Image.new(image.mode, (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def preprocess_image(image: Image.Image, processor: Any, aspect_ratio: str | None) -> torch.Tensor:
    """Pixel values (3, S, S), float32, of one image.

    `aspect_ratio == "pad"` pads to a square with the processor's mean colour; anything else resizes the short side
    to S and cuts out the centre. Equals padding or resizing in full, without the memory of it.
    """
    _check_for_pillow_once()
    image = to_rgb(image)
    side = _side(processor)
    if aspect_ratio == "pad":
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        color = (red, green, blue)
        image = _pad_and_resize(image, color, side, processor.resample) if side else expand2square(image, color)
    elif max(image.size) > _MAX_ASPECT * min(image.size):
        image = _middle(image)
    # Libraries guess the channel axis from the shape, and a height of 1 or 3 looks like channels.
    layout = {"input_data_format": "channels_last"} if image.height <= 3 else {}
    pixels: torch.Tensor = processor.preprocess(image, return_tensors="pt", **layout)["pixel_values"][0]
    return pixels  # (3, S, S)


@functools.cache
def _check_for_pillow_once() -> None:
    """Cache transformers' check for Pillow.

    It runs seven times per image and parses package metadata each time (0.7 ms), as long as preprocessing itself.
    """
    from transformers import image_utils
    from transformers.utils import import_utils

    check = functools.cache(import_utils.is_vision_available)
    image_utils.is_vision_available = check
    import_utils.BACKENDS_MAPPING["vision"] = (check, *import_utils.BACKENDS_MAPPING["vision"][1:])


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: object) -> Any:
    """Pixel values (K, 3, S, S) of K images by `model_cfg.image_aspect_ratio`; a list when their shapes differ."""
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    pixels = [preprocess_image(image, image_processor, aspect_ratio) for image in images]
    return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels


def _side(processor: Any) -> int | None:
    """The side the processor resizes the short edge to, or None for a processor of another kind."""
    edge = processor.size.get("shortest_edge")
    return int(edge) if edge and processor.do_resize else None


def _middle(image: Image.Image) -> Image.Image:
    """The centre of a sliver, four times as long as what the centre crop will keep."""
    width, height = image.size
    keep = 4 * min(image.size)
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    return image.crop((left, top, min(width, left + keep), min(height, top + keep)))


def _pad_and_resize(image: Image.Image, color: tuple[int, ...], side: int, resample: int) -> Image.Image:
    """`expand2square` then a resize to `side`, bit for bit, holding only `_ROWS` rows of the canvas at a time.

    Pillow resizes horizontally, rounds to bytes, then vertically. Rows of the first pass do not see each other, and
    rows of pure padding stay as they are. A very tall image goes through lying down: else every one of its rows
    would be as wide as it is tall (the order of rounding may then change a grey level).
    """
    width, height = image.size
    if height > width and height**2 > _MAX_CANVAS:
        turned = _pad_and_resize(image.transpose(Image.Transpose.TRANSPOSE), color, side, resample)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    long = max(width, height)
    left, top = (long - width) // 2, (long - height) // 2
    strip = Image.new("RGB", (side, long), color)
    for y in range(0, height, _ROWS):
        rows = min(_ROWS, height - y)
        canvas = Image.new("RGB", (long, rows), color)
        canvas.paste(image.crop((0, y, width, y + rows)), (left, 0))
        strip.paste(canvas.resize((side, rows), resample), (0, top + y))
    return strip.resize((side, side), resample)
