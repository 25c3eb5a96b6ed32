"""The inference engine: `load_engine`, `Engine`, `Request`, `SamplingParams`, `Completion`.

Names are imported at first use, so that `llava.engine.detokenizer` can be used without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.engine.engine import Engine, load_engine
    from llava.engine.sequence import (
        Completion,
        GuidedDecodingParams,
        Request,
        RequestHandle,
        SamplingParams,
        TokenLogprobs,
    )
    from llava.engine.statistics import Statistics

__all__ = [
    "Completion",
    "Engine",
    "GuidedDecodingParams",
    "Request",
    "RequestHandle",
    "SamplingParams",
    "Statistics",
    "TokenLogprobs",
    "load_engine",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'llava.engine' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = {"Engine": "engine", "load_engine": "engine", "Statistics": "statistics"}.get(name, "sequence")
    return getattr(importlib.import_module(f"llava.engine.{module}"), name)
