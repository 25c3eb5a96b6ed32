"""Recall, false alarms and speed of `llava check DATA --against BENCHMARK` on images whose copies are known.

    python -m benchmarks.contamination                                      20,000 images, about ten minutes
    python -m benchmarks.contamination '{"images": 400, "copied": 60}'      a small run
    python -m benchmarks.contamination '{"photos": "DIR", "keep": "DIR"}'   with tiles of other photos; keeps the files

The training images are distinct by construction: dead leaves over 1/f noise, which has the statistics of photos (Lee,
Mumford and Huang, IJCV 2001), landscapes of one layout, pages of text, charts, and tiles of the photos that installed
packages bring (a tile has at most a seventh of another's area). 1,000 of them are in both sets: of one half, the
benchmark has a copy of every kind; of the other half, the benchmark has the original and the training set a copy. As
many images of the benchmark have no copy. A false alarm is a training image that is reported with an image that it is
not a copy of. Recall is that of single changes; copies that are cropped, padded, resized and re-encoded at once are
counted beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks.measure import peak_mib
from llava.check import main as check
from llava.images import expand2square

Rng = np.random.Generator
RECORDS = 665_000
WORDS = [
    "the",
    "image",
    "shows",
    "a",
    "red",
    "bus",
    "near",
    "two",
    "people",
    "waiting",
    "water",
    "under",
    "old",
    "house",
]
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
PHOTOS = ("gradio/media_assets/images", "matplotlib/mpl-data/sample_data", "sklearn/datasets/images", "skimage/data")


def color(rng: Rng) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def size_of(rng: Rng) -> tuple[int, int]:
    """Between 320 and 640 pixels, of the shapes of photos."""
    long, ratio = int(rng.integers(320, 641)), rng.choice([0.66, 0.75, 0.75, 1.0])
    size = long, int(long * ratio)
    return size if rng.random() < 0.7 else size[::-1]


def noise(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Colored 1/f noise: octaves of equal contrast."""
    total = np.zeros((size[1], size[0], 3), np.float32)
    for octave in (2, 4, 8, 16, 32, 64):
        values = rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((total / 6).astype(np.uint8))


def leaves(rng: Rng) -> Image.Image:
    """Dead leaves: shapes of power-law sizes that cover each other."""
    image = noise(rng, size_of(rng))
    draw, base = ImageDraw.Draw(image), rng.integers(30, 226, 3)
    for _ in range(int(rng.integers(10, 250))):
        radius = float(np.clip(6 / np.sqrt(rng.random() + 1e-4), 5, 160))
        x, y = rng.random(2) * image.size
        fill = tuple(int(value) for value in np.clip(base + rng.normal(0, 60, 3), 0, 255))
        if rng.random() < 0.5:
            flat = rng.uniform(0.4, 1) * radius
            draw.ellipse((x - radius, y - flat, x + radius, y + flat), fill=fill)
        else:
            angles = np.sort(rng.random(int(rng.integers(3, 7)))) * 2 * np.pi
            draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=fill)
    return Image.blend(image, noise(rng, image.size), 0.2).filter(ImageFilter.GaussianBlur(0.8))


def landscape(rng: Rng) -> Image.Image:
    """Bright above, dark below, a few objects on the horizon: images that are alike at first sight."""
    width, height = size = size_of(rng)
    image = Image.blend(Image.new("RGB", size, color(rng)), noise(rng, size), 0.3)
    draw, horizon = ImageDraw.Draw(image), int(height * rng.uniform(0.4, 0.6))
    sky = np.linspace(250, 170, horizon)[:, None, None] * np.array([0.75, 0.88, 1.0])
    clouds = np.asarray(noise(rng, (width, horizon)), np.float32) - 128
    image.paste(Image.fromarray(np.clip(sky + 0.5 * clouds, 0, 255).astype(np.uint8)), (0, 0))
    for _ in range(int(rng.integers(3, 15))):
        x, w, h = rng.uniform(0, width), rng.uniform(10, 120), rng.uniform(20, 0.35 * height)
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape((x, horizon - h, x + w, horizon + h * rng.uniform(0, 0.6)), fill=color(rng))
    return image.filter(ImageFilter.GaussianBlur(0.8))


def page(rng: Rng) -> Image.Image:
    """Text on paper, in random lines and sizes."""
    width, height = size = size_of(rng)
    image = Image.new("RGB", size, tuple(int(value) for value in rng.integers(225, 256, 3)))
    draw, y = ImageDraw.Draw(image), rng.uniform(5, 60)
    while y < height - 30:
        points = int(rng.choice([10, 12, 14, 18, 30]))
        text = " ".join(rng.choice(WORDS, int(rng.integers(2, 14))))
        ink = tuple(int(value) for value in rng.integers(0, 110, 3))
        draw.text((rng.uniform(5, 0.3 * width), y), text, ink, ImageFont.load_default(points))
        y += points * rng.uniform(1.2, 3)
    return image


def chart(rng: Rng) -> Image.Image:
    """Bars or lines between axes."""
    width, height = size = size_of(rng)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, bottom, count = int(0.1 * width), int(0.88 * height), int(rng.integers(4, 16))
    heights = bottom - rng.uniform(0.05, 0.8, (2, count)) * height
    step = (width - 1.5 * left) / count
    if rng.random() < 0.5:
        for index, top in enumerate(heights[0]):
            draw.rectangle((left + index * step, top, left + (index + 0.7) * step, bottom), fill=color(rng))
    else:
        for row in heights:
            draw.line([(left + index * step, y) for index, y in enumerate(row)], color(rng), int(rng.integers(2, 6)))
    draw.line([(left, 10), (left, bottom), (width - 10, bottom)], "black", 2)
    draw.text((left, 2), " ".join(rng.choice(WORDS, 6)), "black", ImageFont.load_default(14))
    return image


def photo_tiles(folders: list[Path]) -> list[tuple[Path, int, int, int]]:
    """Tiles of photos (file, tiles per side, column, row): 3 x 3 of each, and every second of 8 x 8."""
    tiles = []
    for file in sorted(file for folder in folders for file in folder.glob("*") if file.suffix.lower() in SUFFIXES):
        with contextlib.suppress(OSError), Image.open(file) as image:
            for count in (3, 8) if image.mode == "RGB" else ():
                if min(image.size) / count >= 90:
                    cells = [(x, y) for x in range(count) for y in range(count) if count == 3 or (x + y) % 2]
                    tiles += [(file, count, x, y) for x, y in cells if detailed(cut(image, count, x, y))]
    return tiles


def cut(image: Image.Image, count: int, x: int, y: int) -> Image.Image:
    width, height = image.width // count, image.height // count
    return image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))


def detailed(image: Image.Image) -> bool:
    """Whether there is more to see than sky or wall, which look the same everywhere."""
    return float(np.asarray(image.convert("L").resize((32, 32))).std()) > 15


def encode(image: Image.Image, rng: Rng, least: int = 70) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(least, 95)))
    return buffer.getvalue()


def resized(image: Image.Image, rng: Rng) -> Image.Image:
    width, height = image.size
    scale = rng.uniform(max(0.3, 96 / min(image.size)), 1)
    return image.resize((int(width * scale), int(height * scale * rng.uniform(0.85, 1))), Image.Resampling.BICUBIC)


def reencoded(image: Image.Image, rng: Rng) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if rng.random() < 0.7 else "WEBP", quality=int(rng.integers(15, 60)))
    return Image.open(buffer).convert("RGB")


def padded(image: Image.Image, rng: Rng) -> Image.Image:
    width, height = image.size
    left, top, right, bottom = (rng.uniform(0, 0.3, 4) * (width, height, width, height)).astype(int).tolist()
    fill = [(0, 0, 0), (255, 255, 255), color(rng)][int(rng.integers(3))]
    canvas = Image.new("RGB", (left + width + right, top + height + bottom), fill)
    canvas.paste(image, (left, top))
    return canvas


def squared(image: Image.Image, rng: Rng) -> Image.Image:
    """As LLaVA pads, in the mean color of CLIP's processor."""
    return expand2square(image, (122, 116, 104))


def cropped(image: Image.Image, rng: Rng) -> Image.Image:
    """Up to 10 % of the width and of the height cut, anywhere."""
    width, height = image.size
    cut, before = rng.uniform(0.02, 0.1, 2), rng.random(2)
    left, top = cut * before * (width, height)
    right, bottom = (1 - cut * (1 - before)) * (width, height)
    return image.crop((round(left), round(top), round(right), round(bottom)))


def combined(image: Image.Image, rng: Rng) -> Image.Image:
    return reencoded(resized(squared(cropped(image, rng), rng), rng), rng)


KINDS: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    each.__name__: each for each in (resized, reencoded, padded, squared, cropped, combined)
}
SCENES = (leaves, leaves, leaves, landscape, landscape, page, chart)
Tile = tuple[Path, int, int, int]


def make(job: tuple[int, str, Tile | None], seed: int, root: Path) -> None:
    """Write an image: `alone` in the training set or the `others`, an `original` with its copies, or a `copy`."""
    index, role, place = job
    rng = np.random.default_rng([seed, index])
    name = f"{index:06d}.jpg"
    if place is not None:
        with Image.open(place[0]) as photo:
            image = cut(photo.convert("RGB"), *place[1:])
    else:
        image = SCENES[int(rng.integers(len(SCENES)))](rng)
    if role == "copy":
        kind = list(KINDS)[int(rng.integers(len(KINDS)))]
        (root / kind / name).write_bytes(encode(image, rng))
        image = KINDS[kind](image, rng)
    for kind in KINDS if role == "original" else ():
        (root / kind / name).write_bytes(encode(KINDS[kind](image, rng), rng))
    (root / ("others" if role == "others" else "data") / name).write_bytes(encode(image, rng))


def build(root: Path, images: int, copied: int, seed: int, photos: list[Path], workers: int) -> int:
    """Write both sets and the annotation file; returns the number of tiles of photos."""
    for name in ("data", "others", *KINDS):
        (root / name).mkdir(parents=True)
    shuffle = random.Random(seed)
    tiles = photo_tiles(photos)
    placed: dict[int, Tile] = dict(
        zip(shuffle.sample(range(images), min(len(tiles), images)), shuffle.sample(tiles, len(tiles)))
    )
    both = shuffle.sample(range(images), copied)
    roles = {index: "original" if number % 2 else "copy" for number, index in enumerate(both)}
    roles |= dict.fromkeys(range(images, images + copied), "others")
    jobs = [(index, roles.get(index, "alone"), placed.get(index)) for index in range(images + copied)]
    with ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(partial(make, seed=seed, root=root), jobs, chunksize=50):
            pass
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "An image."}]
    rows = [{"image": f"{index:06d}.jpg", "conversations": turns} for index in range(images)]
    (root / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return len(placed)


def run_check(root: Path, workers: int, *flags: str) -> tuple[dict[str, Any], float]:
    """The report of `llava check --json`, and its seconds."""
    argv = [str(root / "data.json"), "--image_folder", str(root / "data"), "--cache", str(root / "cache.sqlite")]
    argv += ["--workers", str(workers), *flags, "--json", "--against", str(root / "others")]
    output, begin = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(output):
        status = check(argv + [str(root / kind) for kind in KINDS])
    if status > 1:
        raise RuntimeError(f"llava check ended with status {status}")
    return json.loads(output.getvalue()), time.perf_counter() - begin


def figures(root: Path, report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Copies and those found, by kind, and false alarms: training images, and pairs."""
    found, wrong, pairs = Counter[str](), set(), 0
    for pair in report["image_pairs"]:
        kind, name = Path(pair["benchmark"]).name, Path(pair["benchmark_image"]).name
        if name == Path(pair["training_image"]).name:
            found[kind] += 1
        else:
            wrong.add(pair["training_image"])
            pairs += 1
    counts = {kind: {"copies": len(list((root / kind).iterdir())), "found": found[kind]} for kind in KINDS}
    return {**counts, "false alarms": {"images": len(wrong), "pairs": pairs}}


def main() -> int:
    given: dict[str, Any] = {
        "images": 20_000,
        "copied": 1000,
        "seed": 0,
        "workers": os.cpu_count() or 1,
        "photos": "",
        "keep": "",
    }
    given |= json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    images, workers = given["images"], given["workers"]
    site = Path(Image.__file__).parents[1]
    photos = [site / name for name in PHOTOS] + ([Path(given["photos"])] if given["photos"] else [])
    with contextlib.ExitStack() as stack:
        root = Path(given["keep"] or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (root / "data.json").is_file():
            begin = time.perf_counter()
            tiles = build(root, images, given["copied"], given["seed"], photos, workers)
            print(
                f"{images} images, {tiles} of them tiles of photos, in {time.perf_counter() - begin:.0f} s", flush=True
            )
        (root / "cache.sqlite").unlink(missing_ok=True)
        report, cold = run_check(root, workers)
        warm = run_check(root, workers)[1]
        result = figures(root, report)
    total = images + sum(each["images"] for each in report["benchmarks"])
    alarms = result.pop("false alarms")
    for kind, each in result.items():
        print(f"{kind:<10} {each['found']} of {each['copies']} found ({each['found'] / max(each['copies'], 1):.2%})")
    single = [each for kind, each in result.items() if kind != combined.__name__]
    copies, found = (sum(each[key] for each in single) for key in ("copies", "found"))
    recall, alarm = found / copies, alarms["images"] / images
    print(f"recall {recall:.2%}; false alarms {alarm:.3%}: {alarms['images']} images in {alarms['pairs']} pairs")
    print(f"{total / cold:.0f} images per second with {workers} workers, {total / warm:.0f} once they are hashed")
    for cores in sorted({1, workers, 16}):
        print(f"{RECORDS} images: {RECORDS * cold / total * workers / cores / 60:.0f} minutes on {cores} cores")
    print(f"peak memory of the main process {peak_mib():.0f} MiB")
    return 0 if recall >= 0.99 and alarm <= 0.001 else 1


if __name__ == "__main__":
    sys.exit(main())
