"""Training, evaluation and serving of InternVL-Chat and LLaVA models.

Public names are imported from their modules at first use (PEP 562), so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from llava.engine import Completion, Engine, Request, SamplingParams, load_engine
    from llava.errors import LlavaError
    from llava.model.builder import load_pretrained_model
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

__version__ = "2.0.0"

__all__ = [
    "Completion",
    "Engine",
    "LlavaConfig",
    "LlavaError",
    "LlavaLlamaForCausalLM",
    "Request",
    "SamplingParams",
    "__version__",
    "load_engine",
    "load_pretrained_model",
]

# transformers 4.36.2 calls a function that later versions of torch deprecate.
warnings.filterwarnings("ignore", message=r".*_register_pytree_node", category=FutureWarning)

_MODULES: Final = MappingProxyType(
    {
        **dict.fromkeys(("Completion", "Engine", "Request", "SamplingParams", "load_engine"), "llava.engine"),
        **dict.fromkeys(("LlavaConfig", "LlavaLlamaForCausalLM"), "llava.model.language_model.llava_llama"),
        "LlavaError": "llava.errors",
        "load_pretrained_model": "llava.model.builder",
    }
)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'llava' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
