"""The inference engine: `load_engine`, `Engine`, `Request`, `SamplingParams`, `Completion`."""

from llava.engine.engine import Engine
from llava.engine.loading import load_engine
from llava.engine.request import Completion, Handle, Request, SamplingParams, Statistics

__all__ = ["Completion", "Engine", "Handle", "Request", "SamplingParams", "Statistics", "load_engine"]
