"""Load LoRA runs onto a base model: `non_lora_trainables.bin` and the PEFT adapter.

PEFT ignores tensors it does not recognize; here every tensor of an adapter must match a weight, or loading fails.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.checkpoint import ADAPTER_CONFIG, CORES, NON_LORA_FILE, file_shapes, load_bin, read_json
from llava.utils import require

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PREFIX = "base_model.model."
IGNORED_SETTINGS = ("peft_version", "qalora_group_size", "megatron_core")  # written by PEFT even when not in use
IMPORTING_SETTINGS = {"megatron_config", "megatron_core"}  # PEFT imports the module named by the second
Shapes = Mapping[str, tuple[int, ...]]
Model = TypeVar("Model", bound=nn.Module)


def normalize_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip `base_model.`, then one `model.` if any name starts with `model.model.` (MPT: `model.transformer.`)."""
    state = {name.removeprefix("base_model."): value for name, value in state.items()}
    if any(name.startswith(tuple(f"model.{core}" for core in CORES)) for name in state):
        state = {name.removeprefix("model."): value for name, value in state.items()}
    return state


def read_non_lora(directory: Path) -> dict[str, Tensor]:
    """The fully trained weights of a LoRA run (projector, new token rows), by their names in the model."""
    file = directory / NON_LORA_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{directory} has no {NON_LORA_FILE} with the trained projector; copy it from the same step of the "
            "training run (the projector of another step gives wrong answers)."
        )
    state = normalize_names(load_bin(file))
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


def adapter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter."""
    for file in (directory / name for name in ADAPTER_FILES):
        if file.is_file():
            return file_shapes(file)
    raise CheckpointError(f"{directory} has adapter_config.json but no {' or '.join(ADAPTER_FILES)}.")


def check_adapter(found: Shapes, wanted: Shapes, directory: Path) -> None:
    """Raise `CheckpointError` unless each adapter tensor fits a model weight `(out, in)`: A `(r, in)`, B `(out, r)`."""

    def refuse(name: str, target: str) -> None:
        raise CheckpointError(
            f"{directory}: {name} is {found[name]}, but the base has {target} {wanted.get(target, '(no such weight)')};"
            " pass the --model-base the adapter was trained on."
        )

    read_settings(directory)
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
    config: LoraConfig = peft.LoraConfig(**{key: value for key, value in settings.items() if key in known})
    return config


def attach_adapter(model: nn.Module, directory: Path) -> PeftModel:
    """Wrap the model with the PEFT adapter of `directory`, unmerged; every tensor of the file must be used."""
    peft = require("peft", "train")
    found = adapter_shapes(directory)
    check_adapter(found, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, directory)
    try:
        # Without torch_device, PEFT loads the file onto the first visible GPU, even for a model on the CPU.
        adapted: PeftModel = peft.PeftModel.from_pretrained(
            model, str(directory), config=adapter_settings(directory), torch_device="cpu"
        )
    except Exception as error:  # PEFT raises exceptions of any type for invalid settings
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"The adapter of {directory} cannot be attached to this model ({type(error).__name__}: {text}); copy "
            "adapter_config.json and weights from the same step of the training run."
        ) from error
    used = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if used != set(found):
        name = min(used ^ set(found))
        raise CheckpointError(
            f"{directory}: adapter_config.json and the adapter's weights disagree about {name}; copy both from the "
            "same step of the training run."
        )
    return adapted


def merge_adapter(
    adapted: PeftModel, directory: Path, quantize: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Add the adapter, multiplied in float32, to the weights, and return the plain model.

    `quantize` may merge and quantize layers first.
    """
    try:
        if quantize is not None:
            quantize(adapted.get_base_model())
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"The adapter of {directory} cannot be merged: {error}") from error
    logger.info("merged the adapter of %s", directory)
    return merged


def apply_adapter(model: Model, directory: Path, quantize: Callable[[nn.Module], None] | None = None) -> Model:
    """Merge the PEFT adapter of `directory` into the model (see `merge_adapter`) and return the plain model."""
    return cast("Model", merge_adapter(attach_adapter(model, directory), directory, quantize))
