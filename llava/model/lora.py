"""Adapters on a base model: `non_lora_trainables.bin` and the merge of a PEFT adapter (spec/model.md §11.1)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.checkpoint import NON_LORA_FILE, load_bin
from llava.utils import require

logger = logging.getLogger(__name__)


def normalise_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip `base_model.`, then one `model.` when any key starts with `model.model.`."""
    state = {name.removeprefix("base_model."): value for name, value in state.items()}
    if any(name.startswith("model.model.") for name in state):
        state = {name.removeprefix("model."): value for name, value in state.items()}
    return state


def load_non_lora(model: nn.Module, directory: Path) -> None:
    """Overlay the fully trained weights of a LoRA run (projector, new token rows); each must exist and fit."""
    file = directory / NON_LORA_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{directory} lacks {NON_LORA_FILE}, which holds the trained projector; copy it from the same step of the "
            "training run (another step's projector gives wrong answers)."
        )
    parameters = dict(model.named_parameters())
    state = normalise_names(load_bin(file))
    for name, value in state.items():
        if name not in parameters or parameters[name].shape != value.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such weight"
            raise CheckpointError(f"{file}: {name} is {tuple(value.shape)}, but the model has {found}.")
        with torch.no_grad():
            parameters[name].copy_(value)
    if not any("mm_projector." in name for name in state):
        raise CheckpointError(f"{file} holds no projector weights ('mm_projector.').")


def apply_adapter(model: Any, directory: Path) -> Any:
    """Merge the PEFT adapter of `directory` into the model, in float32 products, and return the plain model."""
    peft = require("peft", "train")
    if not any((directory / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise CheckpointError(f"{directory} has adapter_config.json but no adapter_model.safetensors or .bin.")
    if (directory / "adapter_model.bin").is_file():
        load_bin(directory / "adapter_model.bin")
    merged = peft.PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    logger.info("merged the adapter of %s", directory)
    return merged
