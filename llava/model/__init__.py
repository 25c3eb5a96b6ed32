"""Chat models: vision tower, projector and language model. The public classes are imported at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaMptConfig", "LlavaMptForCausalLM"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'llava.model' has no attribute {name!r}; its names are {', '.join(__all__)}")
    module = "llava_mpt" if "Mpt" in name else "llava_llama"
    return getattr(importlib.import_module(f"llava.model.language_model.{module}"), name)
