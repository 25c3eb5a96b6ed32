"""Load LoRA runs onto a base model: `non_lora_trainables` and the PEFT adapter.

The layers to adapt are those the adapter's file names. PEFT would adapt every module whose name ends in one of
`target_modules`, also in the vision tower, and ignore tensors it does not recognize; here settings and tensors must
agree, and every tensor must match a weight of the model, or loading fails.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError, LlavaError, one_line
from llava.model.checkpoint import (
    ADAPTER_CONFIG,
    CORES,
    EMBEDDINGS,
    NON_LORA_FILE,
    file_shapes,
    has_tensors,
    read_json,
    read_tensors,
    tensor_file,
)
from llava.utils import require

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PREFIX = "base_model.model."
HEADS = (*EMBEDDINGS, "lm_head.weight")  # not adapted by the setting "all-linear"
IGNORED_SETTINGS = (
    *("peft_version", "qalora_group_size", "megatron_core"),  # written by PEFT even when not in use
    *("exclude_modules", "eva_config"),  # the adapter's file names its layers; initialization
)
# Initializations that leave the weights of the base as they are.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
IMPORTING_SETTINGS = {"megatron_config", "megatron_core"}  # PEFT imports the module named by the second
Shapes = Mapping[str, tuple[int, ...]]
Model = TypeVar("Model", bound=nn.Module)


def normalize_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip `base_model.`, then one `model.` if any name starts with `model.model.` (MPT: `model.transformer.`).

    `base_layer.`, which PEFT adds to the names of an adapted layer's own weights, is stripped, too.
    """
    state = {name.removeprefix("base_model.").replace(".base_layer.", "."): value for name, value in state.items()}
    if any(name.startswith(tuple(f"model.{core}" for core in CORES)) for name in state):
        state = {name.removeprefix("model."): value for name, value in state.items()}
    return state


def read_non_lora(directory: Path) -> dict[str, Tensor]:
    """The fully trained weights of a LoRA run (projector, new token rows), by their names in the model."""
    file = directory / NON_LORA_FILE
    if not has_tensors(file):
        raise CheckpointError(
            f"{directory} has no {NON_LORA_FILE} with the trained projector; copy it from the same step of the "
            "training run (the projector of another step gives wrong answers)."
        )
    state = normalize_names(read_tensors(file))
    if not any("mm_projector." in name for name in state):
        raise CheckpointError(
            f"{file} holds no projector weights ('mm_projector.'); copy it from the training run again."
        )
    return state


def check_non_lora(state: Mapping[str, Tensor], wanted: Shapes, directory: Path) -> None:
    """Raise `CheckpointError` unless each weight of `non_lora_trainables.bin` is in the model, with its shape."""
    for name, value in state.items():
        if wanted.get(name) != tuple(value.shape):
            found = wanted.get(name, "no such weight")
            raise CheckpointError(
                f"{directory / NON_LORA_FILE}: {name} is {tuple(value.shape)}, but the model has {found}."
            )


def check_vocabulary(directory: Path, rows: int) -> None:
    """Raise `CheckpointError` unless the adapter was trained with a vocabulary of `rows`, image tokens included."""
    trained = read_json(directory / "config.json").get("vocab_size") if (directory / "config.json").is_file() else None
    if trained not in (None, rows):
        raise CheckpointError(
            f"{directory} was trained with a vocabulary of {trained}, but this base has {rows}; pass the --model-base "
            "it was trained on."
        )


def load_non_lora(model: nn.Module, directory: Path) -> None:
    """Copy the fully trained weights of a LoRA run into the model."""
    state = read_non_lora(directory)
    parameters = dict(model.named_parameters())
    check_vocabulary(directory, cast("PreTrainedModel", model).get_input_embeddings().weight.shape[0])
    check_non_lora(state, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, directory)
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def adapter_file(directory: Path) -> Path:
    """The file with the tensors of an adapter, in one of the formats of `checkpoint.stored_as`."""
    if not has_tensors(directory / ADAPTER_FILES[0]):
        raise CheckpointError(f"{directory} has adapter_config.json but no {' or '.join(ADAPTER_FILES)}.")
    return tensor_file(directory / ADAPTER_FILES[0])


def adapter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names, see `adapter_name`, and shapes of the tensors of an adapter."""
    return {adapter_name(name): shape for name, shape in file_shapes(adapter_file(directory)).items()}


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by the names of `adapter_name`."""
    return {adapter_name(name): tensor for name, tensor in read_tensors(adapter_file(directory)).items()}


def adapter_name(name: str) -> str:
    """The name PEFT writes: with `base_model.model.`, without the names of the adapter and of wrappers in memory."""
    name = re.sub(r"(\.lora_\w+|\.modules_to_save)\.default(?=\.|$)", r"\1", name)
    name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    return ADAPTER_PREFIX + name.removeprefix(ADAPTER_PREFIX)


def check_adapter(found: Shapes, wanted: Shapes, directory: Path) -> None:
    """Raise `CheckpointError` unless the adapter's tensors of shapes `found` fit the model's weights `wanted`.

    Each must fit a weight `(out, in)`: A `(r, in)`, B `(out, r)`; other tensors replace a weight of their shape. The
    settings must name the same layers and ranks.
    """

    def refuse(name: str, target: str) -> None:
        raise CheckpointError(
            f"{directory}: {name} is {found[name]}, but the base has {target} {wanted.get(target, '(no such weight)')};"
            " pass the --model-base the adapter was trained on."
        )

    settings = adapter_settings(directory)
    if not any(".lora_" in name for name in found):
        raise CheckpointError(f"{directory} holds an adapter without LoRA weights ({', '.join(sorted(found)[:3])}).")
    for name, shape in found.items():
        module, marker, rest = name.removeprefix(ADAPTER_PREFIX).partition(".lora_")
        target = f"{module}.weight" if marker else module
        if target not in wanted or (not marker and wanted[target] != shape):
            refuse(name, target)
        for side, axis in (("A", 1), ("B", 0)):
            if rest.startswith(f"{side}.") and shape[axis] != wanted[target][axis]:
                refuse(name, target)
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in found:
            raise CheckpointError(f"{directory}: {name} has no counterpart {other}; the adapter is incomplete.")
    if not adapts_tower(found):  # the settings can match layers of a tower that PEFT did not see
        wanted = {name: shape for name, shape in wanted.items() if "vision_tower." not in name}
    _check_settings(settings, found, wanted, directory)


def _check_settings(settings: LoraConfig, found: Shapes, wanted: Shapes, directory: Path) -> None:
    """Raise `CheckpointError` unless `adapter_config.json` and the adapter's tensors agree about layers and ranks."""
    adapted = adapted_modules(found)
    layers = {name.removesuffix(".weight") for name, shape in wanted.items() if len(shape) == 2 and ".weight" in name}
    with attaching(directory):
        matched = set(_targets(settings, layers)) if settings.target_modules is not None else adapted
        if not matched:
            raise ValueError(f"Target modules {settings.target_modules} are not in it")
        expected = {name for name in matched if "mm_projector." not in name}
        odd = (adapted - matched) | (expected - adapted - _excluded(directory, expected))
        scaled = {name for name in adapted if f"{ADAPTER_PREFIX}{name}.lora_magnitude_vector" in found}
        odd |= scaled ^ (adapted if settings.use_dora else set())
        if settings.modules_to_save:
            odd |= set(_saved(settings, wanted)) - {name.removeprefix(ADAPTER_PREFIX) for name in found}
        _refuse_odd(odd, directory)
        for name, shape in found.items():
            module, _, rest = name.removeprefix(ADAPTER_PREFIX).partition(".lora_")
            rank, _ = rank_and_scale(settings, module)
            if rest.startswith("A.") and shape[0] != rank:
                raise ValueError(f"{name} is {shape}, but adapter_config.json has rank {rank}")


def _refuse_odd(names: set[str], directory: Path) -> None:
    """Raise `CheckpointError` if there are `names` in only one of `adapter_config.json` and weights."""
    if names:
        raise CheckpointError(
            f"{directory}: adapter_config.json and the adapter's weights disagree about {min(names)}; copy both from "
            "the same step of the training run."
        )


def adapted_modules(found: Shapes | Mapping[str, Tensor]) -> set[str]:
    """The names of the modules that an adapter with these tensors adapts."""
    parts = (name.removeprefix(ADAPTER_PREFIX).partition(".lora_") for name in found)
    return {module for module, marker, _ in parts if marker}


def adapts_tower(found: Shapes | Mapping[str, Tensor]) -> bool:
    """Whether an adapter with these tensors adapts layers of the vision tower."""
    return any("vision_tower." in module for module in adapted_modules(found))


def _targets(settings: LoraConfig, modules: set[str]) -> Iterator[str]:
    """Those of the linear `modules` and embeddings that PEFT would adapt with these settings."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if settings.target_modules == "all-linear":
        yield from (name for name in modules if f"{name}.weight" not in HEADS and "_embedding" not in name)
    else:
        yield from (name for name in modules if check_target_module_exists(settings, name))


def _saved(settings: LoraConfig, names: Iterable[str]) -> Iterator[str]:
    """Those weights that are below one of `modules_to_save`, but not of the projector, which is stored elsewhere."""
    ends = tuple(settings.modules_to_save or ())
    for name in names:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts)))
        if "mm_projector." not in name and any(module.endswith(ends) for module in above):
            yield name


def _excluded(directory: Path, modules: set[str]) -> set[str]:
    """Those of `modules` that the `exclude_modules` of a newer PEFT names: by a regular expression or by last parts."""
    given = read_settings(directory).get("exclude_modules") or ()
    if isinstance(given, str):
        return {name for name in modules if re.fullmatch(given, name)}
    ends = [str(one) for one in given] if isinstance(given, list | tuple) else []
    return {name for name in modules if any(name == end or name.endswith(f".{end}") for end in ends)}


def rank_and_scale(settings: LoraConfig, module: str) -> tuple[int, float]:
    """The rank of a module, and the factor of B A in its weight, as PEFT determines them."""
    patterns = [*settings.rank_pattern, *settings.alpha_pattern]
    key = next((key for key in patterns if re.match(rf".*\.{key}$", module)), module)
    rank, alpha = int(settings.rank_pattern.get(key, settings.r)), settings.alpha_pattern.get(key, settings.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank) if rank else 0.0


def read_settings(directory: Path) -> dict[str, object]:
    """Read `adapter_config.json`. Raises `CheckpointError` if the adapter is not a LoRA adapter."""
    settings = read_json(directory / ADAPTER_CONFIG)
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{directory} holds an adapter of type {kind}; only LORA can be loaded.")
    return settings


def adapter_settings(directory: Path) -> LoraConfig:
    """The `LoraConfig` of an adapter. Settings of a newer PEFT are dropped if off, else a `CheckpointError`."""
    peft = require("peft", "train")
    settings = read_settings(directory)
    known = {item.name for item in dataclasses.fields(peft.LoraConfig) if item.init} - IMPORTING_SETTINGS
    unknown = sorted(key for key, value in settings.items() if key not in known | set(IGNORED_SETTINGS) and value)
    if unknown:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG} sets {', '.join(unknown)}, which peft "
            f"{peft.__version__} does not support here; merge the adapter with the release of peft that wrote it."
        )
    with attaching(directory):
        config: LoraConfig = peft.LoraConfig(**{key: value for key, value in settings.items() if key in known})
        for name in ("r", "lora_alpha"):
            if not isinstance(getattr(config, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(config, name)!r}")
        config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    return config


@contextmanager
def attaching(directory: Path) -> Iterator[None]:
    """Turn errors about an adapter's settings into `CheckpointError`; PEFT raises exceptions of any type."""
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The adapter of {directory} cannot be attached to this model ({type(error).__name__}: "
            f"{one_line(error, 300)}); copy "
            "adapter_config.json and weights from the same step of the training run."
        ) from error


def attach_adapter(model: nn.Module, directory: Path) -> PeftModel:
    """Wrap the model with the PEFT adapter of `directory`, unmerged; every tensor of the file must be used.

    Tensors other than LoRA's (trained biases, embeddings, `modules_to_save`) replace the model's weights.
    """
    peft = require("peft", "train")
    state = read_adapter(directory)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_adapter(shapes, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, directory)
    adapted, settings = adapted_modules(state), adapter_settings(directory)
    settings.target_modules = "|".join(map(re.escape, sorted(adapted)))  # these alone, in any part of the model
    settings.layers_to_transform = settings.layers_pattern = settings.modules_to_save = None
    settings.bias, settings.task_type, settings.inference_mode = "none", "CAUSAL_LM", True
    settings.base_model_name_or_path = None
    if settings.init_lora_weights in PLAIN_INITS:
        settings.init_lora_weights = False
    with attaching(directory):
        wrapped: PeftModel = peft.get_peft_model(model, settings)
        loaded = peft.set_peft_model_state_dict(wrapped, {_wrapped_name(n, adapted): t for n, t in state.items()})
    _refuse_odd({*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".lora_" in name)}, directory)
    return wrapped


def _wrapped_name(name: str, adapted: set[str]) -> str:
    """The name of an adapter's tensor in the model once the modules `adapted` are wrapped."""
    module, _, last = name.rpartition(".")
    own = ".lora_" not in name and module.removeprefix(ADAPTER_PREFIX) in adapted
    return f"{module}.base_layer.{last}" if own else name


def merge_adapter(
    adapted: PeftModel, directory: Path, quantize: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Add the adapter, multiplied in float32, to the weights, and return the plain model.

    `quantize` may merge and quantize layers first. Weights keep their dtype.
    """
    dtypes = {name.replace(".base_layer.", "."): p.dtype for name, p in adapted.get_base_model().named_parameters()}
    try:
        if quantize is not None:
            quantize(adapted.get_base_model())
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"The adapter of {directory} cannot be merged: {error}") from error
    for name, parameter in merged.named_parameters():  # DoRA multiplies by a float32 magnitude
        if parameter.is_floating_point() and name in dtypes and parameter.dtype is torch.float32:
            parameter.data = parameter.data.to(dtypes[name])
    logger.info("merged the adapter of %s", directory)
    return merged


def apply_adapter(model: Model, directory: Path, quantize: Callable[[nn.Module], None] | None = None) -> Model:
    """Merge the PEFT adapter of `directory` into the model (see `merge_adapter`) and return the plain model."""
    return cast("Model", merge_adapter(attach_adapter(model, directory), directory, quantize))
