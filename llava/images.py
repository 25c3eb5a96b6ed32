"""Image opening and preprocessing, shared by training, evaluation, chat and serving.

`open_image` is the only decoder of untrusted bytes, `to_rgb` the only conversion to RGB (docs/Data.md has its rules);
`preprocess_image` makes the pixel values of a vision tower.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from llava.download import download
from llava.errors import ImageError, shorten
from llava.utils import describe_content

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor

PROCESS_MODES: Final = ("Default", "Pad", "Crop", "Resize")  # of uploads in the web page
_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which runs Ghostscript
_EXCHANGED: Final = ("JPEG", "MPO", "PNG", "WEBP")  # formats that every server and browser reads (MPO as JPEG),
_PLAIN_MODES: Final = ("1", "L", "P", "RGB")  # and modes that all of them decode to the same pixels
_ALPHA_MODES: Final = ("RGBA", "RGBa", "LA", "La", "PA")
_ORIENTATION: Final = 0x0112  # tag of EXIF
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTED: Final = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # metadata that hold an orientation
_PHOTOMETRIC: Final = 262  # tag of TIFF, 0 where the largest value is black
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
SERVED: Final = ImageLimits(  # of requests to workers
    max_bytes=20 * 2**20, max_pixels=2**25, max_side=16_384, max_aspect=200, formats=("GIF", "JPEG", "PNG", "WEBP")
)


def open_image(
    source: str | Path | bytes | BinaryIO, *, limits: ImageLimits = DEFAULT, min_side: int | None = None
) -> Image.Image:
    """Decode a file, bytes or a binary stream to an RGB image, see `to_rgb`.

    The size is checked before pixels are decoded. URLs are not opened, see `fetch_image`. With `min_side`, a JPEG is
    decoded at 1/2, 1/4 or 1/8 of its size, for speed, if both sides keep at least that many pixels. Raises `ImageError`
    unless `source` is a complete image of a known format within `limits`.
    """
    name = f"image {shorten(source, 200)}" if isinstance(source, str | Path) else "the given image"
    data = _read(source, name, limits.max_bytes)
    with _decoding(name, limits), _open(data, name, limits) as image:
        _check_size(image, name, limits)
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        _scale_transparency(image)
        return _to_rgb(image, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: upright by its EXIF orientation, transparency over white, gray values in 8 bits.

    An animation gives its current frame, the first one of a file. Raises `ImageError` for an image that cannot be
    decoded and for gray values beyond 16 bits.
    """
    with _decoding("the given image", DEFAULT):
        return _to_rgb(image, "the given image")


def _open(data: bytes, name: str, limits: ImageLimits) -> ImageFile.ImageFile:
    """Read the header of an image file."""
    try:
        return Image.open(BytesIO(data), formats=limits.formats)
    except UnidentifiedImageError as error:
        found = describe_content(data)
        raise ImageError(
            f"Cannot read {name}: its content is not {', '.join(limits.formats)}{found and f', but {found}'}."
        ) from error


@contextmanager
def _decoding(name: str, limits: ImageLimits) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"Cannot read {name}: it decodes to more than {limits.max_pixels} pixels.") from error
    except Exception as error:  # Pillow's decoders raise exceptions of any type on damaged input
        raise ImageError(f"Cannot read {name}: the file is damaged or incomplete ({error}).") from error


def read_image_file(path: Path) -> bytes:
    """The content of an image file, undecoded; `ImageError` if it is missing or too large."""
    return _read(path, f"image {shorten(path, 200)}", DEFAULT.max_bytes)


def _read(source: str | Path | bytes | BinaryIO, name: str, max_bytes: int) -> bytes:
    try:
        if isinstance(source, str | Path):
            path = Path(source)
            if not path.is_file():
                hint = " (a path has / between folders)" if "\\" in str(source) else ""
                raise ImageError(f"Cannot read {name}: no such file{hint}.")
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        else:
            data = source if isinstance(source, bytes) else source.read(max_bytes + 1)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"Cannot read {name}: {getattr(error, 'strerror', None) or error}.") from error
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


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # malformed metadata are no fault of the pixels
        turn = None
    rgb = _pixels(image, name)
    if turn is not None:
        rgb = rgb.transpose(turn)
        for key in _ORIENTED:
            rgb.info.pop(key, None)
    return rgb


def _pixels(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _gray(image, name)
    if image.mode == "La":  # premultiplied
        image = image.convert("LA")
    if _has_transparency(image):
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba)
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return image.mode in _ALPHA_MODES or "transparency" in image.info or palette == "RGBA"


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Scale the transparent color of a PNG as Pillow scales the pixels of 2, 4 and 48 bits."""
    key, raw = image.info.get("transparency"), image.tile[0][3] if image.format == "PNG" and image.tile else None
    if isinstance(key, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _gray(image: Image.Image, name: str) -> Image.Image:
    """Gray values of more than 8 bits as RGB: 16-bit ones are divided by 256, floats up to 1 multiplied by 255.

    Values of 32 bits count as 16-bit ones if any is above 255, else as 8-bit ones.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high < 65_536:  # false for NaN, too
        raise ImageError(
            f"Cannot read {name}: its gray values range from {low} to {high}, expected 0 to 255, 0 to 65535, or 0 to 1 "
            "for floats; convert it to 8 bits."
        )
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep or high > 255:
        values = values // 256
    elif image.mode == "F" and high <= 1:
        values = values * 255 + 0.5
    gray = values.astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        gray = 255 - gray
    if (key := image.info.get("transparency")) is not None:
        gray = np.where(np.asarray(image) == key, np.uint8(255), gray)
    return Image.fromarray(gray).convert("RGB")


def is_plain(data: bytes) -> bool:
    """Whether any program decodes an image file to the pixels of `open_image`: opaque 8-bit JPEG, PNG or WebP.

    EXIF orientation is left to the program.
    """
    with _decoding("the given image", DEFAULT), _open(data, "the given image", DEFAULT) as image:
        return (
            image.format in _EXCHANGED
            and image.mode in _PLAIN_MODES
            and not _has_transparency(image)
            and (image.format == "MPO" or not getattr(image, "is_animated", False))
        )


def image_data_url(data: bytes, *, limits: ImageLimits = DEFAULT) -> str:
    """Data URL of an image file for another server: the file if it `is_plain`, else a PNG of `open_image`'s pixels."""
    if is_plain(data):
        kind = {b"\xff\xd8": "jpeg", b"RI": "webp"}.get(data[:2], "png")
    else:
        buffer = BytesIO()
        open_image(data, limits=limits).save(buffer, "PNG")
        kind, data = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


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
    if mode == "Default":
        return image
    image = to_rgb(image)
    if mode == "Pad":
        return expand2square(image, _UPLOAD_PAD_COLOR)
    if mode == "Crop":
        return _center_crop(image, min(image.size))
    return image.resize((_UPLOAD_RESIZE_SIDE, _UPLOAD_RESIZE_SIDE))


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
    """Pixel values (K, 3, S, S) of K images by `model_cfg.image_aspect_ratio`; a list when their shapes differ.

    As published, the alpha channel of an RGBA image is dropped; give the image of `open_image`, which is over white.
    """
    import torch

    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    opaque = [image.convert("RGB") if image.mode == "RGBA" else image for image in images]
    pixels = [preprocess_image(image, image_processor, aspect_ratio) for image in opaque]
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
