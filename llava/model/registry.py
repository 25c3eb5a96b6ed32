"""The registry of language models: a checkpoint's `model_type` names the module that reads it (spec/model.md §7, §13).

Adding one takes a module that defines `LANGUAGE_MODEL = LanguageModelSpec(...)` and a line in `LANGUAGE_MODELS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from llava.errors import CheckpointError

LANGUAGE_MODELS = {
    "llama": "llava.model.language_model.llava_llama",
    "llava": "llava.model.language_model.llava_llama",
    "llava_llama": "llava.model.language_model.llava_llama",
    "llava_mpt": "llava.model.language_model.llava_mpt",
    "mpt": "llava.model.language_model.llava_mpt",
}


@dataclass(frozen=True)
class LanguageModelSpec:
    """Two classes: `config`, whose `from_pretrained` reads every `model_type` registered for it, and `model`, a
    `LlavaForCausalLMMixin` in front of the library's causal language model, whose core is a `LlavaMetaModel`.
    `attention` names the kernels it has."""

    config: type[Any]
    model: type[Any]
    attention: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2")


def language_model_spec(model_type: str, source: str) -> LanguageModelSpec:
    """The registered classes for a configuration; an unknown `model_type` lists the known ones."""
    if model_type not in LANGUAGE_MODELS:
        raise CheckpointError(
            f"{source} is of type {model_type!r}, which is not one of {', '.join(sorted(LANGUAGE_MODELS))}; pass "
            "another directory."
        )
    spec: LanguageModelSpec = importlib.import_module(LANGUAGE_MODELS[model_type]).LANGUAGE_MODEL
    return spec
