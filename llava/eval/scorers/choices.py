"""Reading the option a multiple-choice answer means, leniently; the published rules are with their benchmarks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

LEADING: Final = re.compile(r"\s*(?:[(\[{]\s*([A-Za-z])\s*[)\]}]|([A-Za-z])\s*(?:[.):]|$))")


def read_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter among `options` (letter → text) that an answer means, None if it means none or several.

    A leading letter, alone or with `.`, `)`, `:` or in brackets; else the only option whose text the answer contains.
    """
    match = LEADING.match(text)
    if match:
        letter = (match[1] or match[2]).upper()
        if letter in options:
            return letter
    low = text.lower()
    inside = [letter for letter, option in options.items() if option and _contains(low, option.lower())]
    return inside[0] if len(inside) == 1 else None


def _contains(text: str, option: str) -> bool:
    """Whether `option` stands in `text` as whole words."""
    return re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text) is not None
