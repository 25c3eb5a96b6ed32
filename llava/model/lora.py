"""Adapters on a base model: `non_lora_trainables.bin` and PEFT adapters, strictly (spec/model.md §11.1, users.md LORA).

PEFT leaves out what it does not recognise; here every tensor of an adapter must find its place, or loading fails.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.checkpoint import ADAPTER_CONFIG, CORES, NON_LORA_FILE, file_shapes, load_bin, read_json
from llava.utils import require

logger = logging.getLogger(__name__)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PREFIX = "base_model.model."
HARMLESS = ("peft_version", "qalora_group_size", "megatron_core")  # PEFT writes them even where they mean nothing
IMPORTING = {"megatron_config", "megatron_core"}  # with the first, PEFT imports the module that the second names
Shapes = Mapping[str, tuple[int, ...]]


def normalise_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip `base_model.`, then one `model.` when any key starts with `model.model.` (MPT: `model.transformer.`)."""
    state = {name.removeprefix("base_model."): value for name, value in state.items()}
    if any(name.startswith(tuple(f"model.{core}" for core in CORES)) for name in state):
        state = {name.removeprefix("model."): value for name, value in state.items()}
    return state


def read_non_lora(directory: Path) -> dict[str, Tensor]:
    """The fully trained weights of a LoRA run (projector, new token rows), by the model's own names."""
    file = directory / NON_LORA_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{directory} lacks {NON_LORA_FILE}, which holds the trained projector; copy it from the same step of the "
            "training run (another step's projector gives wrong answers)."
        )
    state = normalise_names(load_bin(file))
    if not any("mm_projector." in name for name in state):
        raise CheckpointError(f"{file} holds no projector weights ('mm_projector.').")
    return state


def check_non_lora(state: Mapping[str, Tensor], wanted: Shapes, directory: Path) -> None:
    """Each weight of `non_lora_trainables.bin` must exist in the model, in the same shape."""
    for name, value in state.items():
        if wanted.get(name) != tuple(value.shape):
            found = wanted.get(name, "no such weight")
            raise CheckpointError(
                f"{directory / NON_LORA_FILE}: {name} is {tuple(value.shape)}, but the model has {found}."
            )


def check_vocabulary(directory: Path, rows: int) -> None:
    """Refuse a base whose vocabulary, image tokens included, is not the one the adapter was trained with (LORA-2)."""
    trained = read_json(directory / "config.json").get("vocab_size") if (directory / "config.json").is_file() else None
    if trained not in (None, rows):
        raise CheckpointError(
            f"{directory} was trained with a vocabulary of {trained}, but this base has {rows}; pass the --model-base "
            "it was trained on."
        )


def load_non_lora(model: nn.Module, directory: Path) -> None:
    """Overlay the fully trained weights of a LoRA run; each must exist and fit."""
    state = read_non_lora(directory)
    parameters = dict(model.named_parameters())
    check_vocabulary(directory, cast("Any", model).get_input_embeddings().weight.shape[0])
    check_non_lora(state, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, directory)
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def adapter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter, safetensors first; code in a `.bin` is refused."""
    for file in (directory / name for name in ADAPTER_FILES):
        if file.is_file():
            return file_shapes(file)
    raise CheckpointError(f"{directory} has adapter_config.json but no {' or '.join(ADAPTER_FILES)}.")


def check_adapter(found: Shapes, wanted: Shapes, directory: Path) -> None:
    """Each tensor of an adapter must belong to a weight of the model and fit it: A `(r, in)`, B `(out, r)`."""

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


def read_settings(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`; another kind of adapter than LoRA is refused."""
    settings = read_json(directory / ADAPTER_CONFIG)
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{directory} holds an adapter of type {kind}; only LORA can be loaded.")
    return settings


def adapter_settings(directory: Path) -> Any:
    """The `LoraConfig` of an adapter. What a newer PEFT wrote is left out where it is off, and refused where not."""
    peft = require("peft", "train")
    settings = read_settings(directory)
    known = {item.name for item in dataclasses.fields(peft.LoraConfig) if item.init} - IMPORTING
    strange = sorted(key for key, value in settings.items() if key not in known | set(HARMLESS) and value)
    if strange:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG} sets {', '.join(strange)}, which cannot be had with peft "
            f"{peft.__version__} here; merge the adapter with the release of peft that wrote it."
        )
    return peft.LoraConfig(**{key: value for key, value in settings.items() if key in known})


def attach_adapter(model: nn.Module, directory: Path) -> Any:
    """Put the PEFT adapter of `directory` onto the model, unmerged; every tensor of the file is used, or it fails."""
    peft = require("peft", "train")
    found = adapter_shapes(directory)
    check_adapter(found, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, directory)
    try:
        # Without torch_device, PEFT loads the file onto the first visible GPU, even for a model on the CPU.
        adapted = peft.PeftModel.from_pretrained(
            model, str(directory), config=adapter_settings(directory), torch_device="cpu"
        )
    except Exception as error:  # for settings that make no sense PEFT raises what it happens to meet
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"The adapter of {directory} cannot be put onto this model ({type(error).__name__}: {text}); copy "
            "adapter_config.json and weights from the same step of the training run."
        ) from error
    used = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if used != set(found):
        name = min(used ^ set(found))
        raise CheckpointError(
            f"{directory}: adapter_config.json and the adapter's weights disagree about {name}; both must come from "
            "the same step of the same run."
        )
    return adapted


def merge_adapter(adapted: Any, directory: Path, quantize: Callable[[nn.Module], None] | None = None) -> Any:
    """Add the adapter's products, computed in float32, to the weights, and return the plain model.

    `quantize` may merge some layers in its own way before (and quantise them).
    """
    try:
        if quantize is not None:
            quantize(adapted.get_base_model())
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"The adapter of {directory} cannot be merged: {error}") from error
    logger.info("merged the adapter of %s", directory)
    return merged


def apply_adapter(model: Any, directory: Path, quantize: Callable[[nn.Module], None] | None = None) -> Any:
    """Merge the PEFT adapter of `directory` into the model (see `merge_adapter`) and return the plain model."""
    return merge_adapter(attach_adapter(model, directory), directory, quantize)
