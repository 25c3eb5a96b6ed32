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
    "timm": "llava.model.multimodal_encoder.timm_encoder:tower",
}
PROJECTORS = {
    "linear": "llava.model.multimodal_projector.builder:linear",
    "mlpNx_gelu": "llava.model.multimodal_projector.builder:mlp_gelu",
    "mlpNx_gelu_ln": "llava.model.multimodal_projector.builder:mlp_gelu",
    "identity": "llava.model.multimodal_projector.builder:IdentityMap.from_config",
    "two_mlp": "llava.model.multimodal_projector.builder:TwoMLPProjector.from_config",
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

    Attributes:
        config: parses the settings of the tower's `config.json`.
        build: makes the module of `depth` layers for a configuration. Its forward takes pixels `(B, 3, H, W)` and
            returns the tokens `(B, T, C)`, or an object with them as `last_hidden_state` (and `query_features`
            `(B, Q, H)`, where the tower has queries). The order of tokens is class token, registers, patches.
        processor: makes the image processor for the tower's directory and `mm_vision_image_size`.
        layers: prefix of the keys of numbered layers; `None` when the features need all layers.
        positions: key of the position table; `None` without one.
        unused: prefixes of keys that do not contribute to the features.
        class_token: whether the first token is a class token.
        registers: number of register tokens; they are never features.
        vision: the part of the configuration that describes the vision transformer.
        queries: number of query tokens for a configuration.
        settings: keys of `config.json` that `config` reads beside those of its class.
    """

    config: Callable[[dict[str, Any]], Any]
    build: Callable[[Any, int], nn.Module]
    processor: Callable[[Path | None, int | None], Any]
    layers: str | None
    positions: str | None
    unused: tuple[str, ...] = ()
    class_token: bool = True
    registers: int = 0
    vision: Callable[[Any], Any] = lambda config: config
    queries: Callable[[Any], int] = lambda config: 0
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LanguageModelSpec:
    """A kind of language model.

    Attributes:
        config: class whose `from_pretrained` reads every `model_type` registered for it.
        model: `LlavaForCausalLMMixin` in front of the library's causal language model; its core is a `LlavaMetaModel`.
        attention: names of its attention implementations, the default first.
    """

    config: type[Any]
    model: type[Any]
    attention: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2")


def tower_type(settings: dict[str, Any]) -> str:
    """The key in `TOWERS` for the settings of a `config.json`; timm's name an architecture and no `model_type`."""
    return str(settings.get("model_type") or ("timm" if "architecture" in settings else None))


def tower_spec(settings: dict[str, Any], source: str) -> TowerSpec:
    """The registered tower for the settings of its `config.json`; raises `CheckpointError` for an unknown type."""
    model_type = tower_type(settings)
    if model_type not in TOWERS:
        raise CheckpointError(
            f"The vision tower {source!r} is of type {model_type!r}, which is not one of {', '.join(sorted(TOWERS))}; "
            "pass another --vision_tower."
        )
    found: TowerSpec | Callable[[dict[str, Any]], TowerSpec] = pkgutil.resolve_name(TOWERS[model_type])
    return found if isinstance(found, TowerSpec) else found(settings)


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
    name = re.sub(r"^mlp[1-9]\d?x_", "mlpNx_", kind)
    if name not in PROJECTORS or kind.startswith("mlpNx_"):
        raise ConfigError(f"Unknown mm_projector_type {kind!r}; use one of {', '.join(PROJECTORS)}.")
    factory: Callable[[Any], nn.Module] = pkgutil.resolve_name(PROJECTORS[name])
    return factory
