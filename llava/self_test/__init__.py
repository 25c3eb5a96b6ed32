"""Checks of `llava doctor --self-test`: tiny models on the device, compared with float32 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence


class CheckFailed(Exception):
    """A check failed; the message has the result and what was expected."""


class CheckSkipped(Exception):
    """A check does not apply here; the message has the reason."""


def within(errors: Sequence[float], limit: float) -> str:
    """The largest of `errors` and its limit as text. Raises `CheckFailed` if it exceeds the limit or is NaN."""
    largest = max(errors, key=lambda error: (math.isnan(error), error))
    text = f"relative error {largest:.1e}, limit {limit:.0e}"
    if not largest <= limit:
        raise CheckFailed(text)
    return text
