"""Perceptual hashes of images, and the similarity of two images: near-duplicates after resizing, padding or cropping.

A hash is the signs of the 64 lowest DCT frequencies of the luminance (Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010), here of 16 crops of up to 10 % of the width and height. An image with a uniform
border, such as the padding of `expand2square`, is hashed with and without it.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

VERSION: Final = 1  # of the hashes; increase it with any change to them
DECODED_SIDE: Final = 120  # pixels of the shorter side that suffice
CUTS: Final = ((0.0, 0.0), (0.075, 0.0), (0.0, 0.075), (0.04, 0.04))  # at the beginning and end of an axis
CROPS: Final = len(CUTS) ** 2  # hashes per view; the first one is not cropped
_SIDE: Final = 64  # pixels of the luminance that is hashed
_FREQUENCIES: Final = 10  # per axis
_MIN_CONTRAST: Final = 2.0  # standard deviation of gray levels below which an image counts as uniform
_BORDER_MEAN, _BORDER_MAX = 3.0, 40.0  # mean and largest deviation from its color of a border's line, in gray levels
_THUMBNAIL: Final = 32  # pixels of the luminance and color that are compared
_STARTS: Final = 4  # alignments that are tried
_REDUCE: Final = 2  # factor of the resolution while edges move
_STEPS: Final = ((16, (0.03, 0.015)), (_THUMBNAIL, (0.01, 0.005)))  # resolutions, and moves of an edge at each
_HOPELESS: Final = 0.5  # luminance correlation before alignment below which a pair is rejected
_SAME_COLOR: Final = 0.8  # agreement of color above which only luminance counts; JPEG keeps little of pale colors
_GRAY: Final = 6.0  # deviation of color from gray that counts as gray
_MIN_CONTENT: Final = 0.3  # fraction of the width and height inside a border


def _bases() -> Floats:
    """DCT bases (cuts, frequencies, side) over the part of an axis that each cut leaves."""
    fine = (np.arange(_SIDE * 16) + 0.5) / (_SIDE * 16)
    rows = []
    for before, after in CUTS:
        position = (fine - before) / (1 - before - after)
        waves = np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * position) * ((position > 0) & (position < 1))
        rows.append(waves.reshape(_FREQUENCIES, _SIDE, 16).mean(-1))
    return np.array(rows, np.float32)


def _lowest() -> npt.NDArray[np.intp]:
    """Indices of the 64 lowest frequencies except the constant, ordered to spread over the bytes of a hash."""
    v, u = np.divmod(np.arange(_FREQUENCIES**2), _FREQUENCIES)
    return np.argsort(u**2 + v**2, kind="stable")[1:65].reshape(16, 4).T.reshape(-1)


_BASES: Final = _bases().reshape(-1, _SIDE)
_LOWEST: Final = _lowest()


def content_box(image: Image.Image) -> Box:
    """The box inside the uniform border of an RGB image; the whole image if there is no border or little inside it."""
    pixels = np.asarray(image)
    width, height = image.size
    columns = pixels.transpose(1, 0, 2)
    left, right = _border(columns), width - _border(columns[::-1])
    top, bottom = _border(pixels), height - _border(pixels[::-1])
    if right - left < _MIN_CONTENT * width or bottom - top < _MIN_CONTENT * height:
        return 0, 0, width, height
    return left, top, right, bottom


def _border(lines: npt.NDArray[np.uint8]) -> int:
    """Number of leading lines (N, M, 3) in the color of the first one."""
    color = lines[0].mean(0)
    for index, line in enumerate(lines):
        deviation = np.abs(line - color)
        if deviation.mean() > _BORDER_MEAN or deviation.max() > _BORDER_MAX:
            return index
    return len(lines)


def hashed_views(image: Image.Image) -> list[tuple[Box, Hashes]]:
    """Boxes of the whole RGB image and of its content, if it has a border, with their hashes (16,).

    Empty for a uniform image.
    """
    gray = image.convert("L")
    found: list[tuple[Box, Hashes]] = []
    for box in dict.fromkeys([(0.0, 0.0, float(image.width), float(image.height)), content_box(image)]):
        small = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.BOX, box), np.float32)
        if small.std() < _MIN_CONTRAST:
            break
        waves = (_BASES @ (small - small.mean()) @ _BASES.T).reshape(len(CUTS), _FREQUENCIES, len(CUTS), _FREQUENCIES)
        bits = waves.transpose(0, 2, 1, 3).reshape(CROPS, -1)[:, _LOWEST] > 0
        found.append((box, np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64)[:, 0]))
    return found


def hash_image(image: Image.Image) -> Hashes:
    """Hashes (V, 16) of the one or two views of an RGB image, (0, 16) if it is uniform."""
    return np.array([hashes for _, hashes in hashed_views(image)], np.uint64).reshape(-1, CROPS)


def similarity(first: Image.Image, second: Image.Image) -> float:
    """Similarity of two RGB images, at most 1: their luminance correlation after alignment, if their colors agree.

    Views of one image are aligned with crops of the other that have close hashes, by moving the edges of the crop.
    """
    views = [hashed_views(image) for image in (first, second)]
    planes = [image.convert("YCbCr") for image in (first, second)]
    starts = []
    for fixed, other in ((0, 1), (1, 0)):
        for first_number, (view, hashes) in enumerate(views[fixed]):
            for number, (box, crops) in enumerate(views[other]):
                if first_number == number == 0 and len(views[0]) == len(views[1]) == 2:
                    continue  # both have borders, whose contrast to the content would dominate the correlation
                bits = [int(each).bit_count() for each in crops ^ hashes[0]]
                starts.append((min(bits), fixed, view, _crop(box, int(np.argmin(bits)))))
    best = 0.0
    for _, fixed, view, crop in sorted(starts)[:_STARTS]:
        target = planes[fixed].resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX, view)
        image = planes[1 - fixed]
        box = _aligned(target.getchannel(0), image.getchannel(0), crop)
        pixels, aligned = _pixels(target), _pixels(image, box)
        luminance, color = correlation(pixels[..., 0], aligned[..., 0]), _color_agreement(pixels, aligned)
        best = max(best, luminance if color > _SAME_COLOR else min(luminance, color))
    return best


def _crop(box: Box, index: int) -> Box:
    """The box of a crop."""
    left, top, right, bottom = box
    (above, below), (before, after) = CUTS[index // len(CUTS)], CUTS[index % len(CUTS)]
    width, height = right - left, bottom - top
    return left + before * width, top + above * height, right - after * width, bottom - below * height


def _pixels(image: Image.Image, box: Box | None = None, side: int = _THUMBNAIL) -> Floats:
    """A box of an image, resized to a square."""
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box), np.float32)


def _aligned(target: Image.Image, image: Image.Image, box: Box) -> Box:
    """The box near `box` of a gray image that correlates best with `target`, by moving one edge at a time.

    Low resolutions come first, since they tolerate imprecise boxes.
    """
    whole, image = image.size * 2, image.reduce(_REDUCE)
    box = _scaled(box, whole, image.size * 2)
    size = image.size * 2
    for side, steps in _STEPS:
        reference = _pixels(target, None, side)
        best = correlation(reference, _pixels(image, box, side))
        for step, edge, sign in product(steps if best > _HOPELESS else (), range(4), (-1, 1)):
            edges = list(box)
            edges[edge] = min(max(edges[edge] + sign * step * size[edge], 0), size[edge])
            moved = (edges[0], edges[1], edges[2], edges[3])
            if (value := correlation(reference, _pixels(image, moved, side))) > best:
                box, best = moved, value
    return _scaled(box, size, whole)


def _scaled(box: Box, size: tuple[int, ...], other: tuple[int, ...]) -> Box:
    left, top, right, bottom = (min(edge * new / old, new) for edge, old, new in zip(box, size, other))
    return left, top, right, bottom


def correlation(first: Floats, second: Floats) -> float:
    """Normalized correlation; 0 if either array is constant."""
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm else 0.0


def _color_agreement(first: Floats, second: Floats) -> float:
    """1 minus the relative squared difference of colors, with noise weighted down; 1 if either image is gray."""
    chroma = [each[..., 1:] - 128 for each in (first, second)]
    if min(float(np.abs(each).max()) for each in chroma) < _GRAY:
        return 1.0
    energy = float((chroma[0] ** 2).mean() + (chroma[1] ** 2).mean())
    return 1 - float(((chroma[0] - chroma[1]) ** 2).mean()) / (energy + _GRAY**2)
