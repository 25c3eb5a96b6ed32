"""Image opening and preprocessing: modes, limits, published pixel values, extreme aspect ratios."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from llava.errors import ImageError
from llava.images import (
    ImageLimits,
    expand2square,
    fetch_image,
    open_image,
    preprocess_image,
    process_images,
    to_rgb,
)

MEAN = (123, 116, 103)


def processor(size: int) -> Any:
    return CLIPImageProcessor(
        crop_size=size, size=size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header declares a size far beyond its data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ------------------------------------------------------------------ opening


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (5, 3)])
def test_every_mode_becomes_rgb(mode: str, size: tuple[int, int]) -> None:
    wanted = 255 if mode == "1" else 200
    base = Image.new("L", size, wanted)
    image = Image.new("I;16", size, 200 * 256 + 7) if mode == "I;16" else base.convert(mode)
    kind = {"CMYK": "TIFF", "I": "TIFF", "F": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    result = to_rgb(image) if mode == "PA" else open_image(encoded(image, kind))  # no file format stores PA
    assert (result.mode, result.size) == ("RGB", size)
    assert max(abs(value - wanted) for value in np.asarray(result).flatten().tolist()) <= 2


def test_transparent_palette_does_not_warn() -> None:
    image = noise(8, 8).quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        over_white = 255 - (255 - np.asarray(image.convert("RGB"), float)) * np.asarray(image)[..., None] / 255
        assert np.abs(np.asarray(open_image(data)) - over_white).max() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = noise(4, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = open_image(encoded(image, "PNG", exif=exif))
    assert result.size == ((4, 2) if orientation < 5 else (2, 4))
    assert (result.tobytes() == image.tobytes()) is (orientation == 1)
    assert sorted(result.tobytes()) == sorted(image.tobytes())


def test_sources(tmp_path: Path) -> None:
    data = encoded(noise(3, 2))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (data, path, str(path), io.BytesIO(data)):
        assert open_image(source).size == (3, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_rejected(kind: str) -> None:
    data = encoded(noise(64, 64), kind)
    for length in (1, 10, len(data) // 2):
        with pytest.raises(ImageError, match="Cannot read the given image"):
            open_image(data[:length])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "its content is not"),
        (b"hello, this is text", "its content is not"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "its content is not"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "its content is not"),
        (png_claiming(50_000, 50_000), "more than|exceeds"),
        (png_claiming(9_000, 9_000), "exceeds 67108864 pixels"),
        (png_claiming(70_000, 1), "a side of 65535"),
        (png_claiming(100, 100), "damaged or incomplete"),
    ],
)
def test_attacks_are_rejected_before_decoding(data: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why) as error:
        open_image(data)
    assert str(error.value).count("\n") == 0


def test_byte_limit_of_files_and_streams(tmp_path: Path) -> None:
    data = encoded(noise(32, 32))
    limits = ImageLimits(max_bytes=len(data) - 1)
    path = tmp_path / "big.png"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        with pytest.raises(ImageError, match=f"more than {len(data) - 1} bytes"):
            open_image(source, limits=limits)
        open_image(data, limits=ImageLimits(max_bytes=len(data)))


@pytest.mark.parametrize("path", ["missing.png", ".", "a\0b.png", "x" * 5000, "https://example.org/a.png", ""])
def test_not_a_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="Cannot read image"):
        open_image(path)


def test_a_pipe_is_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "pipe")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_damaged_bytes_give_an_image_or_image_error(kind: str, data: st.DataObject) -> None:
    original = bytearray(encoded(noise(9, 7), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about malformed metadata
        with contextlib.suppress(ImageError):
            assert open_image(bytes(original)).mode == "RGB"


# ------------------------------------------------------------------ padding and preprocessing


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 260), st.integers(1, 260), st.sampled_from([16, 56, 112]), st.integers(0, 9))
def test_padding_in_strips_is_bit_identical(width: int, height: int, size: int, seed: int) -> None:
    image, proc = noise(width, height, seed), processor(size)
    plain = proc.preprocess(expand2square(image, MEAN), return_tensors="pt", input_data_format="channels_last")
    assert torch.equal(preprocess_image(image, proc, "pad"), plain["pixel_values"][0])


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 200), st.integers(4, 200), st.sampled_from([None, "square"]))
def test_without_padding_equals_the_processor(width: int, height: int, ratio: str | None) -> None:
    image, proc = noise(width, height), processor(32)
    if max(width, height) <= 32 * min(width, height):
        plain = proc.preprocess(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(preprocess_image(image, proc, ratio), plain)


@pytest.mark.parametrize("size", [(9, 2), (2, 9)])
def test_aspect_ratio_limit(size: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    assert open_image(out.getvalue(), limits=ImageLimits(max_aspect=4.5)).size == size
    with pytest.raises(ImageError, match=r"exceeds a ratio of 4.4 to 1"):
        open_image(out.getvalue(), limits=ImageLimits(max_aspect=4.4))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 300), (300, 1), (3, 90), (90, 3), (20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("ratio", ["pad", None])
def test_extreme_aspect_ratios(size: tuple[int, int], ratio: str | None) -> None:
    image = Image.new("RGB", size, (200, 100, 50))
    pixels = preprocess_image(image, processor(56), ratio)
    assert (pixels.shape, pixels.dtype) == ((3, 56, 56), torch.float32)
    wanted = (torch.tensor([200, 100, 50]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    centre = pixels[:, 28, 28]
    if ratio is None:
        assert torch.allclose(pixels, wanted[:, None, None].expand_as(pixels), atol=0.05)
    elif size[0] == size[1]:
        assert torch.allclose(centre, wanted, atol=0.05)


def test_center_crop_before_the_resize_keeps_the_result() -> None:
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.tile(ramp, (10, 1))[..., None], 3, 2))  # 400x10, aspect 40
    proc = processor(28)
    full = proc.preprocess(image, return_tensors="pt")["pixel_values"][0]
    assert (preprocess_image(image, proc, None) - full).abs().max() < 0.05


def test_memory_of_extreme_aspect_ratios(tmp_path: Path) -> None:
    """Peak resident memory of a fresh process, including allocations of Pillow."""
    Image.new("RGB", (20_000, 1), MEAN).save(tmp_path / "wide.png")
    Image.new("RGB", (1, 20_000), MEAN).save(tmp_path / "tall.png")
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from PIL import Image
from llava.images import open_image, preprocess_image
from tests.test_images import processor
preprocess_image(Image.new("RGB", (500, 400)), processor(336), "pad")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("wide", "tall"):
    for ratio in ("pad", "square"):
        pixels = preprocess_image(open_image({str(tmp_path)!r} + f"/{{name}}.png"), processor(336), ratio)
        assert pixels.shape == (3, 336, 336)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64


def test_a_very_tall_image_equals_its_transpose() -> None:
    image = noise(60, 9000)
    lying = preprocess_image(image.transpose(Image.Transpose.TRANSPOSE), processor(56), "pad")
    assert torch.equal(preprocess_image(image, processor(56), "pad"), lying.transpose(1, 2))


def test_expand2square() -> None:
    image = noise(5, 2)
    square = expand2square(image, MEAN)
    assert square.size == (5, 5)
    assert square.crop((0, 1, 5, 3)).tobytes() == image.tobytes()
    assert {square.getpixel((x, y)) for x in range(5) for y in (0, 3, 4)} == {MEAN}
    assert expand2square(image.crop((0, 0, 2, 2)), MEAN).mode == "RGB"
    for mode, wanted in {"L": "RGB", "1": "RGB", "P": "RGB", "RGBA": "RGBA", "I;16": "RGB"}.items():
        source = Image.new("I;16", (5, 2)) if mode == "I;16" else image.convert(mode)
        assert expand2square(source, MEAN).mode == wanted
    with pytest.raises(ImageError, match="scale it down first"):
        expand2square(Image.new("RGB", (20_000, 1)), MEAN)


def test_process_images() -> None:
    images = [noise(40, 30), noise(30, 50).convert("L")]
    stacked = process_images(images, processor(28), SimpleNamespace(image_aspect_ratio="pad"))
    assert stacked.shape == (2, 3, 28, 28)
    assert torch.equal(stacked[1], preprocess_image(images[1], processor(28), "pad"))
    uncropped = CLIPImageProcessor(do_center_crop=False, size={"shortest_edge": 28})
    assert [p.shape[1:] for p in process_images(images, uncropped, object())] == [(28, 37), (46, 28)]


@pytest.mark.golden
def test_golden_images(golden_dir: Path) -> None:
    book = json.loads((golden_dir / "images" / "cases.json").read_text())
    for case in book["cases"]:
        config = SimpleNamespace(image_aspect_ratio=case["image_aspect_ratio"])
        images = []
        for name in case["files"]:
            image = Image.open(golden_dir / "images" / name)
            image.load()
            images.append(image)
        pixels = process_images(images, processor(case["size"]), config).double()
        expect = case["expect"]
        assert list(pixels.shape) == expect["shape"]
        difference = (pixels.flatten()[torch.tensor(expect["index"])] - torch.tensor(expect["value"])).abs()
        assert int((difference > 0.02).sum()) <= 2, case["id"]
        assert abs(pixels.mean().item() - expect["mean"]) < 2e-3
        assert abs(pixels.std(unbiased=False).item() - expect["std"]) < 2e-3


def test_fetch_image_rejects_other_schemes() -> None:
    for url in ("http://example.org/a.png", "file:///etc/passwd", "/etc/passwd.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError, match="its scheme must be https"):
            fetch_image(url)


def test_the_check_for_pillow_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers repeats it for each image, parsing package metadata."""
    image = noise(30, 20)
    want = preprocess_image(image, processor(56), "pad")
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail(f"asked for {name} again"))
    assert torch.equal(preprocess_image(image, processor(56), "pad"), want)
