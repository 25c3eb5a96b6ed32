"""The inference engine: `load_engine`, `Engine`, `Request`, `SamplingParams`, `Completion`.

Fetched at first use, so that a program that only cleans text (`llava.engine.detokenizer`) does not load torch.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from llava.engine.engine import Engine, load_engine
    from llava.engine.sequence import Completion, Request, RequestHandle, SamplingParams, Statistics

__all__ = ["Completion", "Engine", "Request", "RequestHandle", "SamplingParams", "Statistics", "load_engine"]

_HOME: Final = MappingProxyType({**dict.fromkeys(__all__, "sequence"), "Engine": "engine", "load_engine": "engine"})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava.engine' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"llava.engine.{_HOME[name]}"), name)
