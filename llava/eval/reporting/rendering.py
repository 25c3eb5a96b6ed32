"""HTML pages of reports from the Jinja templates in `templates/`; all texts are escaped."""

from __future__ import annotations

import base64
import functools
import io
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from llava.eval.reporting.errors import KINDS


@functools.cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    found = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    found.globals["KINDS"] = KINDS
    found.filters["number"] = lambda value: f"{value:,}"
    found.filters["short_path"] = lambda path: "/".join(Path(path).parts[-2:])
    found.tests["nan"] = math.isnan
    return found


def render(template: str, **values: object) -> str:
    """A self-contained page."""
    return _environment().get_template(template).render(**values)


def data_url(image: Image.Image, side: int, quality: int) -> str:
    """A thumbnail with a longer side of `side` pixels, as JPEG in a data URL."""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
