"""One conversion to RGB, the same in every program: transparency, deep gray values, orientation, animations."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.engine.chat import load_image as load_chat_image
from llava.engine.sequence import hash_image
from llava.errors import ImageError
from llava.eval.run.images import Base64Images, ImageFolder
from llava.images import SERVED, image_data_url, is_plain, open_image, preprocess_image, process_upload, to_rgb
from llava.mm_utils import load_image_from_base64
from llava.serve.web.images import load_image as load_upload
from tests.test_images import encoded, noise, png_claiming, processor

WHITE = (255, 255, 255)
WITH_ALPHA = ("RGBA", "LA", "RGBa", "La")


def png(depth: int, color: int, row: bytes, **chunks: bytes) -> bytes:
    """A PNG of one row of two pixels, with further chunks in front of the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0))]
    parts += [(name.encode(), data) for name, data in chunks.items()]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def two(array: Any, kind: str = "TIFF", **options: Any) -> bytes:
    """An image file of two pixels."""
    return encoded(Image.fromarray(np.asarray(array)[None]), kind, **options)


def ink(mode: str, kind: str = "PNG", **options: Any) -> bytes:
    """Two transparent pixels of black, as drawings and logos have them."""
    return encoded(Image.new(mode, (2, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0)), kind, **options)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value), little endian."""
    body, table, end = b"", struct.pack("<H", len(entries)), 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", end + len(body))
        body += value if len(value) > 4 else b""
        table += struct.pack("<HHI", tag, kind, count) + place
    return b"Exif\0\0II*\0\x08\0\0\0" + table + bytes(4) + body


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
FLOAT, DEEP = np.float32, np.uint16
# A file of two pixels, and these in RGB; a number stands for a gray.
FILES: dict[str, tuple[bytes, list[Any]]] = {
    "RGBA": (ink("RGBA"), [255, 255]),
    "half RGBA": (two(np.array([[200, 100, 50, 128], [9, 8, 7, 255]], np.uint8), "PNG"), [(227, 177, 152), (9, 8, 7)]),
    "LA": (ink("LA"), [255, 255]),
    "16-bit LA": (png(16, 4, b"\1\1\0\0\2\2\xff\xff"), [255, 2]),
    "WebP with alpha": (ink("RGBA", "WEBP", lossless=True), [255, 255]),
    "palette, alpha of an entry": (png(8, 3, b"\0\1", PLTE=bytes(6), tRNS=b"\0"), [255, 0]),
    "palette, transparent index of a GIF": (
        encoded(Image.frombytes("P", (2, 1), b"\0\1"), "GIF", transparency=0),
        [255, None],
    ),
    "transparent color": (png(8, 2, bytes(range(6)), tRNS=b"\0\3\0\4\0\5"), [(0, 1, 2), 255]),
    "transparent color of 48 bits": (png(16, 2, bytes(range(12)), tRNS=bytes(range(6, 12))), [(0, 2, 4), 255]),
    "transparent gray": (png(8, 0, b"\1\5", tRNS=b"\0\5"), [1, 255]),
    "transparent black of 1 bit": (png(1, 0, b"\x40", tRNS=b"\0\0"), [255, 255]),
    "transparent gray of 2 bits": (png(2, 0, b"\x10", tRNS=b"\0\1"), [0, 255]),
    "transparent gray of 4 bits": (png(4, 0, b"\x1f", tRNS=b"\0\1"), [255, 255]),
    "transparent gray of 16 bits": (png(16, 0, b"\1\2\3\4", tRNS=b"\3\4"), [1, 255]),
    "TIFF with alpha": (two(np.array([[0, 0, 0, 0], [9, 8, 7, 255]], np.uint8)), [255, (9, 8, 7)]),
    "16-bit gray": (two(np.array([256, 65535], DEEP), "PNG"), [1, 255]),
    "16-bit gray, big endian": (two(np.array([256, 65535], ">u2")), [1, 255]),
    "16-bit gray, white is zero": (two(np.array([256, 65535], DEEP), tiffinfo={262: 0}), [254, 0]),
    "32-bit gray to 65535": (two(np.array([256, 65535], np.int32)), [1, 255]),
    "32-bit gray to 255": (two(np.array([7, 200], np.int32)), [7, 200]),
    "floats to 1": (two(np.array([0.5, 1], FLOAT)), [128, 255]),
    "floats to 255": (two(np.array([0.5, 200], FLOAT)), [0, 200]),
    "floats to 65535": (two(np.array([256, 65535], FLOAT)), [1, 255]),
    "PGM of 16 bits": (b"P5 2 1 65535\n\0\x10\x20\0", [0, 32]),
    "PFM": (b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 0.5, 1), [128, 255]),
    "CMYK of Adobe": (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 2),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind(name: str) -> None:
    data, wanted = FILES[name]
    image = open_image(data)
    assert (image.mode, image.size) == ("RGB", (2, 1))
    for x, pixel in enumerate(wanted):
        if pixel is not None:
            assert image.getpixel((x, 0)) == ((pixel,) * 3 if isinstance(pixel, int) else pixel)


@pytest.mark.parametrize("name", ["RGBA", "half RGBA", "palette, alpha of an entry", "transparent gray", "floats to 1"])
def test_every_program_sees_the_same_pixels(name: str, tmp_path: Path) -> None:
    """Data, chat, API, page, evaluation and the Python API of the engine."""
    data, _ = FILES[name]
    path = tmp_path / ("a.tiff" if data[:2] == b"II" else "a.png")
    path.write_bytes(data)
    want = open_image(path).tobytes()
    text = base64.b64encode(data).decode()
    images = {
        "chat": load_chat_image(str(path)),
        "base64": load_image_from_base64(text),
        "MMBench": Base64Images({"x": text}).open("x"),
        "folder": ImageFolder(tmp_path).open(path.name),
        "page": load_upload(str(path)).decode(),
        "remote": load_image_from_base64(image_data_url(ImageFolder(tmp_path).read(path.name)).partition(",")[2]),
        "engine": hash_image(Image.open(path)).content,
        "mode of the page": process_upload(Image.open(path), "Crop").crop((0, 0, 2, 1)),
    }
    crop = images.pop("mode of the page")
    assert {key: image.tobytes() == want for key, image in images.items()} == dict.fromkeys(images, True)  # type: ignore[union-attr]
    assert crop.tobytes()[:3] == want[:3]  # type: ignore[union-attr]
    pixels = preprocess_image(Image.open(path), processor(16), "pad")
    assert pixels.equal(preprocess_image(open_image(path), processor(16), "pad"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", *WITH_ALPHA])
def test_opaque_images_are_converted_as_before(mode: str) -> None:
    image = noise(7, 5)
    if mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    image = image.convert(mode)
    want = (image.convert("LA") if mode == "La" else image).convert("RGB")
    assert to_rgb(image).tobytes() == want.tobytes()


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "P"])
def test_images_in_memory_with_transparency(mode: str) -> None:
    if mode == "P":
        image = Image.new("RGBA", (2, 1), (200, 0, 0, 0)).quantize(4)
    elif mode == "PA":
        image = Image.new("P", (2, 1))
        image.putalpha(0)
    else:
        base = {"RGBa": "RGBA", "La": "LA"}[mode]
        image = Image.new(base, (2, 1), (200, 0) if base == "LA" else (200, 0, 0, 0)).convert(mode)
    assert image.mode == mode
    assert to_rgb(image).getpixel((1, 0)) == WHITE


def test_palettes_are_part_of_an_image_of_the_engine() -> None:
    """Two images of equal indices and other colors."""
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert hash_image(red).digest != hash_image(blue).digest
    assert hash_image(red).digest == hash_image(Image.new("RGB", (4, 4), "red")).digest


@pytest.mark.parametrize(
    "values", [[-1, 5], [0, 70_000], np.array([np.nan, 1], FLOAT), np.array([0, 1e9], FLOAT)], ids=str
)
def test_gray_values_without_a_rule_are_refused(values: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(two(values if isinstance(values, np.ndarray) else np.array(values, np.int32)))
    with pytest.raises(ImageError, match=r"a.tiff: its gray values range from .* convert it to 8 bits"):
        open_image(path)


# ------------------------------------------------------------------ orientation and animations


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("entries", [[TURNED], [TURNED, (0x011A, 2, 6, b"72dpi\0")]], ids=["plain", "text resolution"])
def test_orientation_is_applied_whatever_stands_beside_it(kind: str, entries: Any) -> None:
    image = open_image(encoded(noise(4, 2), kind, exif=exif(*entries)))
    assert image.size == (2, 4)
    assert to_rgb(image.resize((6, 12))).size == (6, 12)


def test_orientation_of_an_image_in_memory_is_applied_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(noise(4, 2), "JPEG", exif=exif(TURNED)))
    image = Image.open(tmp_path / "a.jpg")
    assert to_rgb(image).size == to_rgb(to_rgb(image)).size == (2, 4)
    assert to_rgb(image).tobytes() == open_image(tmp_path / "a.jpg").tobytes()


@pytest.mark.parametrize("block", [b"garbage!", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"], ids=repr)
def test_a_bad_exif_block_is_ignored(block: bytes) -> None:
    plain = noise(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about some
        assert open_image(png(8, 2, bytes(range(6)), eXIf=block)).getpixel((1, 0)) == (3, 4, 5)
        assert open_image(encoded(plain, "JPEG", exif=block)).size == (4, 2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_several_frames_give_the_first(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = open_image(data).getpixel((8, 8))  # type: ignore[misc]
    assert red > 250 and blue < 5


# ------------------------------------------------------------------ files for other programs


def test_plain_files_are_passed_on_and_others_become_png() -> None:
    for kind, name in (("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpeg")):
        data = encoded(noise(9, 5), kind)
        assert image_data_url(data) == f"data:image/{name};base64,{base64.b64encode(data).decode()}"
    for key in ("RGBA", "palette, transparent index of a GIF", "16-bit gray", "CMYK of Adobe", "floats to 1"):
        data, _ = FILES[key]
        head, _, text = image_data_url(data).partition(",")
        assert head == "data:image/png;base64" and not is_plain(data)
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert (image.mode, image.tobytes()) == ("RGB", open_image(data).tobytes())
    with pytest.raises(ImageError, match="its content is not GIF"):
        image_data_url(FILES["floats to 1"][0], limits=SERVED)


# ------------------------------------------------------------------ what is no image


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC; convert it to JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC; convert it to JPEG"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF; convert it to JPEG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
        (b"\n<!DOCTYPE html><html>", "an HTML page; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer; run git lfs pull"),
        (b"\x1f\x8b\x08\0", "gzip; decompress it"),
        (b"\0\0\1\0\1\0", "an icon"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    ],
)
def test_other_files_are_called_what_they_are(data: bytes, found: str) -> None:
    with pytest.raises(ImageError, match=f"its content is not BMP, .*WEBP, but {found}"):
        open_image(data)


def test_text_that_is_no_path_gives_a_short_line() -> None:
    with pytest.raises(ImageError) as error:
        open_image(base64.b64encode(noise(60, 45).tobytes()).decode())
    assert len(str(error.value)) < 300
    with pytest.raises(ImageError, match="a path has / between folders"):
        open_image("folder\\a.png")
    with pytest.raises(ImageError, match=r"Cannot read image a.png\\n: no such file"):
        open_image("a.png\n")


def test_extreme_sizes() -> None:
    for size in ((1, 1), (30_000, 1), (1, 30_000)):
        image = open_image(encoded(Image.new("LA", size), "PNG"))
        assert preprocess_image(image, processor(16), "pad").shape == (3, 16, 16)
    with pytest.raises(ImageError, match="exceeds"):
        open_image(png_claiming(9_000, 9_000))
