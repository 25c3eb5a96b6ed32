"""InternVL-Chat: an InternViT tower, an MLP projector and a Vicuna, with their training, evaluation and chat.

Importing the package costs nothing: every public name below is fetched from its module at first use (PEP 562), and an
error in that module reaches the caller as it is.
"""

from __future__ import annotations

import importlib
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

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

# transformers 4.36.2 calls a function that torch has renamed since: harmless, and three lines on every start.
warnings.filterwarnings("ignore", message=r".*_register_pytree_node", category=FutureWarning)

_HOME: Final = MappingProxyType(
    {
        "Completion": "llava.engine",
        "Engine": "llava.engine",
        "LlavaConfig": "llava.model.language_model.llava_llama",
        "LlavaError": "llava.errors",
        "LlavaLlamaForCausalLM": "llava.model.language_model.llava_llama",
        "Request": "llava.engine",
        "SamplingParams": "llava.engine",
        "load_engine": "llava.engine",
        "load_pretrained_model": "llava.model.builder",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
