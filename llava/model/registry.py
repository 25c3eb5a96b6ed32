"""Registries of vision towers, projectors and language models, by the name in a configuration.

Values are entry points `module:attribute`, imported at first use; this module imports nothing of `llava.model`.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llava.errors import CheckpointError, ConfigError

TOWERS = {
    "intern_vit_6b": "llava.model.multimodal_encoder.intern_vit_6b:TOWER",
    "clip_vision_model": "llava.model.multimodal_encoder.clip_encoder:TOWER",
    "clip": "llava.model.multimodal_encoder.clip_encoder:TOWER",
    "internvl": "llava.model.multimodal_encoder.internvl_14b:TOWER",
}
PROJECTORS = {
    "linear": "llava.model.multimodal_projector.builder:linear",
    "mlpNx_gelu": "llava.model.multimodal_projector.builder:mlp_gelu",
    "mlpNx_gelu_ln": "llava.model.multimodal_projector.builder:mlp_gelu",
    "identity": "llava.model.multimodal_projector.builder:IdentityMap.of_config",
    "two_mlp": "llava.model.multimodal_projector.builder:TwoMLPProjector.of_config",
}
LANGUAGE_MODELS = {
    "llama": "llava.model.language_model.llava_llama:LANGUAGE_MODEL",
    "llava": "llava.model.language_model.llava_llama:LANGUAGE_MODEL",
    "llava_llama": "llava.model.language_model.llava_llama:LANGUAGE_MODEL",
    "llava_mpt": "llava.model.language_model.llava_mpt:LANGUAGE_MODEL",
    "mpt": "llava.model.language_model.llava_mpt:LANGUAGE_MODEL",
}


@dataclass(frozen=True)
class TowerSpec:
    """A kind of vision tower.

    `config(settings)` parses the tower's `config.json`; `build(config, depth)` makes the module, whose forward takes
    `(B, 3, H, W)` pixels and returns an object with `last_hidden_state` `(B, 1 + N, C)` after `depth` layers (and
    `query_features`, where the tower has `queries`); `processor(directory, size)` makes the image processor;
    `vision(config)` is the part of the configuration that describes the vision transformer. Keys that start with
    `layers` and an index are its layers (`None`: all are needed); keys that start with one of `unused` never reach
    the features; `positions` is the key of the position table.
    """

    config: Callable[[dict[str, Any]], Any]
    build: Callable[[Any, int], nn.Module]
    processor: Callable[[Path | None, int | None], Any]
    layers: str | None
    positions: str
    unused: tuple[str, ...] = ()
    vision: Callable[[Any], Any] = lambda config: config
    queries: Callable[[Any], int] = lambda config: 0


@dataclass(frozen=True)
class LanguageModelSpec:
    """A kind of language model.

    `config` is a class whose `from_pretrained` reads every `model_type` registered for it, and `model` a
    `LlavaForCausalLMMixin` in front of the library's causal language model, whose core is a `LlavaMetaModel`.
    `attention` names its attention implementations, the default first.
    """

    config: type[Any]
    model: type[Any]
    attention: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2")


def tower_spec(settings: dict[str, Any], source: str) -> TowerSpec:
    """The registered tower for the settings of its `config.json`; raises `CheckpointError` for an unknown type."""
    model_type = str(settings.get("model_type"))
    if model_type not in TOWERS:
        raise CheckpointError(
            f"The vision tower {source!r} is of type {model_type!r}, which is not one of {', '.join(sorted(TOWERS))}; "
            "pass another --vision_tower."
        )
    spec: TowerSpec = pkgutil.resolve_name(TOWERS[model_type])
    return spec


def language_model_spec(model_type: str, source: str) -> LanguageModelSpec:
    """The registered language model for a `model_type`; raises `CheckpointError` for an unknown one."""
    if model_type not in LANGUAGE_MODELS:
        raise CheckpointError(
            f"{source} is of type {model_type!r}, which is not one of {', '.join(sorted(LANGUAGE_MODELS))}; pass "
            "another directory."
        )
    spec: LanguageModelSpec = pkgutil.resolve_name(LANGUAGE_MODELS[model_type])
    return spec


def projector_factory(kind: str) -> Callable[[Any], nn.Module]:
    """The registered factory, configuration to module, for an `mm_projector_type` such as `mlp2x_gelu`.

    Raises `ConfigError` for an unknown type.
    """
    name = kind if kind in PROJECTORS else re.sub(r"^mlp[1-9]\d?x_", "mlpNx_", kind)
    if name not in PROJECTORS or kind.startswith("mlpNx"):
        raise ConfigError(f"Unknown mm_projector_type {kind!r}; use one of {', '.join(PROJECTORS)}.")
    factory: Callable[[Any], nn.Module] = pkgutil.resolve_name(PROJECTORS[name])
    return factory
