"""LoRA adapters that are served beside their base, unmerged; what cannot be computed beside it exactly is refused.

An adapter may have low-rank matrices of the decoder's linear layers and a projector of its own. Requests with it get
the answers of `load_pretrained_model(adapter, base)`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llava.errors import CheckpointError, ConfigError
from llava.mm_utils import get_model_name_from_path
from llava.model import checkpoint as ckpt
from llava.model import lora
from llava.model.builder import SIZES, local_directory, read_config
from llava.model.checkpoint import Checkpoint, Kind
from llava.model.language_model.causal_lm import LlavaForCausalLMMixin
from llava.model.llava_arch import copy_into, parameter_shapes
from llava.model.quantization import PREFIXES

if TYPE_CHECKING:
    from peft import LoraConfig

REMEDY: Final = "merge it with scripts/merge_lora_weights.py, and serve the result with --model-path"
DECODER_SETTINGS: Final = (
    *(*SIZES, "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("max_position_embeddings", "tie_word_embeddings", "mm_use_im_start_end"),
)
VISION_SETTINGS: Final = (
    *("mm_vision_tower", "mm_projector_type", "mm_hidden_size", "mm_image_hidden_size", "mm_vision_select_layer"),
    *("mm_vision_select_feature", "mm_vision_image_size", "image_aspect_ratio"),
)
DEFAULTS: Final = {"mm_projector_type": "linear", "mm_vision_select_feature": "patch"}


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter of a loaded model.

    `weights` are A (r, in) and B (out, r) with the scale in it, float32, by the name of the linear layer. `projector`
    is None if it is the base's, `config` if the adapter comes without one.
    """

    name: str
    path: Path
    weights: dict[str, tuple[Tensor, Tensor]]
    projector: nn.Module | None = None
    config: PretrainedConfig | None = None


def load_lora_adapter(
    name: str,
    path: str | Path,
    model: LlavaForCausalLMMixin,
    base: str | Path | None = None,
    image_aspect_ratio: str | None = None,
) -> LoraAdapter:
    """Read the adapter of a directory or hub name for a loaded `model`, whose weights are those of `base`.

    `image_aspect_ratio` is that of all requests, if not the model's. Raises `CheckpointError` for an adapter of another
    base, and for one that has to be merged.
    """
    found = ckpt.inspect(local_directory(path))
    if found.kind is not Kind.LORA:
        raise CheckpointError(f"{found.path} holds {found.kind.value}; --lora takes the directory of a LoRA adapter.")
    settings, state = lora.adapter_settings(found.path), lora.read_adapter(found.path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_base(found, settings, base)
    _check_form(found, settings, shapes)
    config = _check_settings(found, model, image_aspect_ratio)
    wanted = _model_shapes(model)
    lora.check_vocabulary(found.path, model.get_input_embeddings().weight.shape[0])
    lora.check_adapter(shapes, wanted, found.path)
    others = {name.removeprefix(lora.ADAPTER_PREFIX): value for name, value in state.items() if ".lora_" not in name}
    projector = None
    if getattr(config, "mm_vision_tower", None) or ckpt.has_tensors(found.path / ckpt.NON_LORA_FILE):
        beside = lora.read_non_lora(found.path)
        lora.check_non_lora(beside, wanted, found.path)
        projector = _own_projector(found, model, beside)
        others |= {name: value for name, value in beside.items() if "mm_projector." not in name}
    _check_unchanged(found, model, others)
    weights = {module: _scaled(state, settings, module) for module in sorted(lora.adapted_modules(state))}
    return LoraAdapter(name, found.path, weights, projector, config)


def served_base(model_path: str | Path, model_base: str | Path | None) -> str | Path:
    """The language model or chat model that adapters of a served checkpoint must have been trained on."""
    kind = ckpt.inspect(local_directory(model_path)).kind
    if kind is Kind.LORA:
        raise ConfigError(
            f"--model-path {model_path} is a LoRA adapter, to which --lora cannot add others; pass their base as "
            "--model-path, and this adapter with --lora too."
        )
    return model_base if kind is Kind.PROJECTOR and model_base is not None else model_path


def _check_base(found: Checkpoint, settings: LoraConfig, base: str | Path | None) -> None:
    """Raise `CheckpointError` if the adapter names another base; it may have been trained at another path."""
    named = settings.base_model_name_or_path
    if not named or base is None:
        return
    names = {get_model_name_from_path(str(one)).lower() for one in (base, Path(base).resolve())}
    same_directory = Path(named).is_dir() and Path(named).resolve() == Path(base).resolve()
    if not same_directory and get_model_name_from_path(str(named)).lower() not in names:
        raise CheckpointError(
            f"{found.path} was trained on {named}, but the base is {base}; serve that one, or if they are the same, "
            "correct base_model_name_or_path in adapter_config.json."
        )


def _check_form(found: Checkpoint, settings: LoraConfig, shapes: lora.Shapes) -> None:
    """Raise `CheckpointError` for adapters that are more than low-rank terms of the decoder's linear layers."""
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise CheckpointError(
            f"{found.path}: {empty} is {shapes[empty]}, of rank 0; copy it from the training run again."
        )
    outside = next((name for name in sorted(lora.adapted_modules(shapes)) if not name.startswith(PREFIXES)), None)
    reason = ""
    if settings.use_dora or any("lora_magnitude" in name for name in shapes):
        reason = "it is weight-decomposed (use_dora)"
    elif outside is not None:
        reason = f"it adapts {outside}, which is not in the decoder's layers"
    elif settings.init_lora_weights not in lora.PLAIN_INITS:
        reason = f"init_lora_weights {settings.init_lora_weights!r} has changed the weights of its base"
    elif getattr(settings, "layer_replication", None):
        reason = "it repeats layers (layer_replication)"
    if reason:
        raise CheckpointError(f"{found.path} cannot be served beside its base: {reason}; {REMEDY}.")


def _check_settings(
    found: Checkpoint, model: LlavaForCausalLMMixin, image_aspect_ratio: str | None
) -> PretrainedConfig | None:
    """The configuration of the adapter, if it has one; raises `CheckpointError` if the base computes otherwise."""
    if not found.config:
        return None
    trained = read_config(found)
    if getattr(trained, "mm_vision_tower", None) and model.get_vision_tower() is None:
        raise CheckpointError(
            f"{found.path} was trained with the vision tower {trained.mm_vision_tower}, but the base has none; serve "
            "the projector-only checkpoint of stage 1 with --model-base, or a chat model."
        )
    for key in (*DECODER_SETTINGS, *VISION_SETTINGS):
        ours, theirs = (getattr(one, key, None) or DEFAULTS.get(key) for one in (trained, model.config))
        if key == "image_aspect_ratio":
            ours, theirs = ("pad" if one == "pad" else "crop" for one in (ours, image_aspect_ratio or theirs))
        blind = model.get_vision_tower() is None or not getattr(trained, "mm_vision_tower", None)
        if key in VISION_SETTINGS and (blind or None in (ours, theirs)):
            continue  # the tower's default
        if key == "mm_vision_tower":
            ours, theirs = Path(str(ours)).name, Path(str(theirs)).name
        if ours != theirs:
            hint = "pass --image-aspect-ratio, or " if key == "image_aspect_ratio" else ""
            raise CheckpointError(
                f"{found.path} was trained with {key}={ours}, but the base has {theirs}; {hint}serve the base it was "
                f"trained on, or {REMEDY}."
            )
    return trained


def _model_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's weights, of quantized layers too."""
    sizes = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    linear = {f"{name}.weight": (module.out_features, module.in_features) for name, module in sizes}
    return {**parameter_shapes(model), **linear}


def _own_projector(found: Checkpoint, model: LlavaForCausalLMMixin, state: dict[str, Tensor]) -> nn.Module | None:
    """The adapter's projector; None if it equals the base's."""
    file = found.path / ckpt.NON_LORA_FILE
    trained = ckpt.projector_state(state, file)
    base = model.get_model().mm_projector
    ckpt.compare_shapes({name: tuple(value.shape) for name, value in trained.items()}, parameter_shapes(base), file)
    projector = copy.deepcopy(base)
    copy_into(projector, trained)
    same = (torch.equal(*both) for both in zip(projector.parameters(), base.parameters(), strict=True))
    return None if all(same) else projector


def _check_unchanged(found: Checkpoint, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` if one of the adapter's whole `weights` differs from the model's."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        own = parameters[name]
        if own.shape != value.shape or not torch.equal(own.detach(), value.to(own)):
            raise CheckpointError(f"{found.path} cannot be served beside its base: it replaces {name}; {REMEDY}.")


def _scaled(state: dict[str, Tensor], settings: LoraConfig, module: str) -> tuple[Tensor, Tensor]:
    down, up = (state[f"{lora.ADAPTER_PREFIX}{module}.lora_{side}.weight"].float() for side in "AB")
    return down, up * lora.rank_and_scale(settings, module)[1]
