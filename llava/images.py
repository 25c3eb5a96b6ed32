"""Image opening and preprocessing, shared by training, evaluation, chat and serving.

`open_image` is the only decoder of untrusted bytes; `preprocess_image` makes the pixel values of a vision tower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from llava.download import download
from llava.errors import ImageError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

PROCESS_MODES: Final = ("Default", "Pad", "Crop", "Resize")  # of uploads in the web page
_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which runs Ghostscript
_UPLOAD_PAD_COLOR: Final = (122, 116, 104)  # mean of the CLIP processor, used for every tower
_UPLOAD_RESIZE_SIDE: Final = 336
_MAX_CANVAS: Final = 2**26  # pixels of a padded image held in memory
_MAX_ASPECT: Final = 32  # long : short side above which the center is cropped before the resize
_STRIP_ROWS: Final = 64  # rows of a padded image held at a time


@dataclass(frozen=True)
class ImageLimits:
    """Bounds of an accepted image: encoded bytes, decoded pixels, longer side, aspect ratio, Pillow formats."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64 * 2**20
    max_side: int = 65_535
    max_aspect: float = math.inf
    formats: tuple[str, ...] = _FORMATS


DEFAULT: Final = ImageLimits()


def open_image(source: str | Path | bytes | BinaryIO, *, limits: ImageLimits = DEFAULT) -> Image.Image:
    """Decode a file, bytes or a binary stream to an RGB image, rotated by its EXIF orientation.

    The size is checked before pixels are decoded. Animations give their first frame. URLs are not opened, see
    `fetch_image`. Raises `ImageError` unless `source` is a complete image of a known format within `limits`.
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
    except Exception as error:  # Pillow's decoders raise exceptions of any type on damaged input
        raise ImageError(f"Cannot read {name}: the file is damaged or incomplete ({error}).") from error


def _read(source: str | Path | bytes | BinaryIO, name: str, max_bytes: int) -> bytes:
    try:
        if isinstance(source, str | Path):
            path = Path(source)
            if not path.is_file():
                raise ImageError(f"Cannot read {name}: no such file.")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        else:
            data = source if isinstance(source, bytes) else source.read(max_bytes + 1)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"Cannot read {name}: {error}.") from error
    if len(data) > max_bytes:
        raise ImageError(f"Cannot read {name}: it has more than {max_bytes} bytes.")
    return data


def _check_size(image: Image.Image, name: str, limits: ImageLimits) -> None:
    size = f"{image.width}x{image.height}"
    if image.width * image.height > limits.max_pixels or max(image.size) > limits.max_side:
        raise ImageError(
            f"Cannot read {name}: its size {size} exceeds {limits.max_pixels} pixels or a side of {limits.max_side}."
        )
    if max(image.size) > limits.max_aspect * min(image.size):
        raise ImageError(f"Cannot read {name}: its size {size} exceeds a ratio of {limits.max_aspect:g} to 1.")


def fetch_image(
    url: str, *, limits: ImageLimits = DEFAULT, timeout: float = 10.0, unsafe_local: bool = False
) -> Image.Image:
    """Open the image behind an https URL on a public host; see `llava.download.download` for the conditions."""
    return open_image(download(url, limits.max_bytes, timeout=timeout, unsafe_local=unsafe_local), limits=limits)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB, scaling 16-bit gray to 8 bits and dropping transparency."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # which Pillow would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # a direct conversion to RGB emits a warning
    return image.convert("RGB")


def expand2square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Pad an image to a square of its longer side, centered; an odd remainder goes right or below.

    Modes other than RGB and RGBA are converted to RGB. Raises `ImageError` for a canvas beyond 2**26 pixels.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side**2 > _MAX_CANVAS:
        raise ImageError(f"Padding a {width}x{height} image needs a {side}x{side} canvas; scale it down first.")
    image = image if image.mode in ("RGB", "RGBA") else to_rgb(image)
    canvas = Image.new(image.mode, (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def process_upload(image: Image.Image, mode: str) -> Image.Image:
    """Apply one of `PROCESS_MODES` to an uploaded image.

    `Pad` pads to a square, `Crop` keeps the center square, `Resize` stretches to 336x336, `Default` changes nothing.
    """
    if mode == "Pad":
        return expand2square(to_rgb(image), _UPLOAD_PAD_COLOR)
    if mode == "Crop":
        return _center_crop(image, min(image.size))
    return image.resize((_UPLOAD_RESIZE_SIDE, _UPLOAD_RESIZE_SIDE)) if mode == "Resize" else image


def _center_crop(image: Image.Image, side: int) -> Image.Image:
    """Crop each edge longer than `side` to it, around the center."""
    width, height = min(image.width, side), min(image.height, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def preprocess_image(image: Image.Image, processor: BaseImageProcessor, aspect_ratio: str | None) -> torch.Tensor:
    """Pixel values (3, S, S), float32, of one image.

    With `aspect_ratio == "pad"` the image is padded to a square in the processor's mean color; otherwise its short
    edge is resized to S and the center cropped. Extreme aspect ratios cost no more memory than others.
    """
    _cache_pillow_check()
    image = to_rgb(image)
    side = processor.size.get("shortest_edge") if processor.do_resize else None
    if aspect_ratio == "pad":
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        color = (red, green, blue)
        image = _pad_and_resize(image, color, int(side), processor.resample) if side else expand2square(image, color)
    elif max(image.size) > _MAX_ASPECT * min(image.size):
        image = _center_crop(image, 4 * min(image.size))  # the processor keeps a part of it
    # transformers infers the channel axis from the shape, and takes a height of 1 or 3 for channels.
    layout = {"input_data_format": "channels_last"} if image.height <= 3 else {}
    pixels: torch.Tensor = processor.preprocess(image, return_tensors="pt", **layout)["pixel_values"][0]
    return pixels


def process_images(
    images: Sequence[Image.Image], image_processor: BaseImageProcessor, model_cfg: object
) -> torch.Tensor | list[torch.Tensor]:
    """Pixel values (K, 3, S, S) of K images by `model_cfg.image_aspect_ratio`; a list when their shapes differ."""
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    pixels = [preprocess_image(image, image_processor, aspect_ratio) for image in images]
    return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels


@functools.cache
def _cache_pillow_check() -> None:
    """Cache transformers' check for Pillow, which parses package metadata seven times per image (0.7 ms)."""
    from transformers import image_utils
    from transformers.utils import import_utils

    check = functools.cache(import_utils.is_vision_available)
    image_utils.is_vision_available = check
    import_utils.BACKENDS_MAPPING["vision"] = (check, *import_utils.BACKENDS_MAPPING["vision"][1:])


def _pad_and_resize(image: Image.Image, color: tuple[int, int, int], side: int, resample: int) -> Image.Image:
    """`expand2square` followed by a resize to `side`, bit for bit, with `_STRIP_ROWS` rows of the canvas at a time.

    Pillow resizes horizontally, rounds to bytes, then resizes vertically, so rows are independent in the first pass
    and rows of padding keep their color. Very tall images are transposed first, which bounds the width of a row; the
    changed order of rounding may then change a value by one.
    """
    width, height = image.size
    if height > width and height**2 > _MAX_CANVAS:
        transposed = _pad_and_resize(image.transpose(Image.Transpose.TRANSPOSE), color, side, resample)
        return transposed.transpose(Image.Transpose.TRANSPOSE)
    long = max(width, height)
    left, top = (long - width) // 2, (long - height) // 2
    resized = Image.new("RGB", (side, long), color)
    for y in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - y)
        strip = Image.new("RGB", (long, rows), color)
        strip.paste(image.crop((0, y, width, y + rows)), (left, 0))
        resized.paste(strip.resize((side, rows), resample), (0, top + y))
    return resized.resize((side, side), resample)
