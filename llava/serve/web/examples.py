"""Example images of the web page, drawn at startup: a chart, a shop sign, an order form, a room.

python -m llava.serve.web.examples FOLDER
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

_INK: Final = (40, 44, 52)
_PAPER: Final = (250, 248, 242)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def chart() -> Image.Image:
    """A scatter chart with labelled points and axes."""
    image = Image.new("RGB", (640, 480), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((320, 22), "Speed and accuracy of six models", _INK, _font(24), anchor="mm")
    draw.line((80, 50, 80, 420, 610, 420), _INK, 3)
    for step in range(6):
        draw.text((70, 420 - 68 * step), str(50 + 10 * step), _INK, _font(16), anchor="rm")
        draw.text((80 + 100 * step, 438), str(20 * step), _INK, _font(16), anchor="mm")
    draw.text((345, 464), "images a second", _INK, _font(18), anchor="mm")
    draw.text((88, 56), "accuracy, %", _INK, _font(18))
    points = ((10, 92, "A"), (22, 88, "B"), (35, 86, "C"), (52, 79, "D"), (70, 66, "E"), (94, 58, "F"))
    for x, y, name in points:
        left, top = 80 + 5 * x, 420 - 6.8 * (y - 50)
        draw.ellipse((left - 9, top - 9, left + 9, top + 9), (214, 84, 64))
        draw.text((left + 14, top - 12), name, _INK, _font(18))
    return image


def sign() -> Image.Image:
    """A shop with a sign above its window."""
    image = Image.new("RGB", (640, 480), (176, 98, 74))
    draw = ImageDraw.Draw(image)
    for row in range(0, 480, 24):
        draw.line((0, row, 640, row), (150, 80, 60), 2)
        for left in range(-30 + 30 * (row // 24 % 2), 640, 60):
            draw.line((left, row, left, row + 24), (150, 80, 60), 2)
    draw.rounded_rectangle((60, 50, 580, 170), 14, (28, 84, 70), (235, 205, 120), 6)
    draw.text((320, 92), "THE LITTLE BAKERY", (245, 225, 160), _font(44), anchor="mm")
    draw.text((320, 142), "fresh bread daily from 7 am", (245, 240, 225), _font(24), anchor="mm")
    draw.rectangle((90, 210, 400, 430), (190, 220, 232), (70, 50, 40), 8)
    for left in (130, 220, 310):
        draw.ellipse((left, 350, left + 66, 400), (205, 150, 80), (140, 90, 40), 3)
    draw.rectangle((450, 210, 550, 480), (120, 60, 40), (70, 40, 30), 6)
    draw.ellipse((530, 340, 544, 354), (230, 200, 110))
    return image


def form() -> Image.Image:
    """An order form without personal data."""
    image = Image.new("RGB", (640, 480), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 620, 460), None, _INK, 3)
    draw.text((320, 55), "ORDER FORM No. 0042", _INK, _font(30), anchor="mm")
    rows = [("Item", "garden table"), ("Colour", "dark green"), ("Quantity", "3"), ("Price each", "45.00")]
    rows += [("Delivery", "Tuesday, morning"), ("Total", "135.00")]
    for index, (label, value) in enumerate(rows):
        top = 100 + 56 * index
        draw.text((50, top + 28), label, (110, 110, 120), _font(22), anchor="lm")
        draw.text((240, top + 28), value, _INK, _font(26), anchor="lm")
        draw.line((230, top + 48, 590, top + 48), (190, 190, 200), 2)
    return image


def room() -> Image.Image:
    """A cat in front of a mirror that reflects it."""
    image = Image.new("RGB", (640, 480), (232, 222, 204))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 370, 640, 480), (170, 130, 94))
    draw.rectangle((340, 60, 580, 400), (214, 232, 240), (120, 84, 50), 12)
    grain = random.Random(0)
    for _ in range(60):
        x, y = grain.randrange(640), grain.randrange(372, 480)
        draw.line((x, y, x + 40, y), (158, 118, 84), 1)
    for centre, coat in ((190, (92, 92, 104)), (460, (120, 122, 136))):
        _cat(draw, centre, coat)
    return image


def _cat(draw: ImageDraw.ImageDraw, centre: int, coat: tuple[int, int, int]) -> None:
    draw.ellipse((centre - 60, 240, centre + 60, 400), coat)
    draw.ellipse((centre - 46, 170, centre + 46, 258), coat)
    for side in (-1, 1):
        tip = centre + side * 40
        draw.polygon(((centre + side * 12, 184), (tip, 140), (centre + side * 44, 206)), coat)
        draw.ellipse((centre + side * 18 - 7, 200, centre + side * 18 + 7, 216), (240, 220, 90))
        for angle in (-0.2, 0.0, 0.2):
            end = (centre + side * 76 * math.cos(angle), 232 + 76 * math.sin(angle))
            draw.line((centre + side * 14, 232, *end), (245, 245, 245), 2)
    draw.polygon(((centre - 6, 222), (centre + 6, 222), (centre, 232)), (220, 140, 140))


EXAMPLES: Final[tuple[tuple[str, Callable[[], Image.Image], str], ...]] = (
    ("chart", chart, "What does this chart say?"),
    ("sign", sign, "Describe this image in detail."),
    ("form", form, "Extract the text as JSON."),
    ("room", room, "How many cats are there, and why?"),
)


def draw_all(folder: Path) -> list[tuple[Path, str]]:
    """Write the images to `folder` as PNG; returns their paths and questions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, draw, question in EXAMPLES:
        path = folder / f"{name}.png"
        draw().save(path)
        rows.append((path, question))
    return rows


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
