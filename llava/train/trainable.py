"""Which parameters learn, and in what precision each is kept (spec/train.md §8.2)."""

from __future__ import annotations

from typing import Any

import torch

from llava.arguments import ModelArguments, TrainingArguments
from llava.errors import ConfigError, TrainingError
from llava.model.checkpoint import layer_index
from llava.model.zero import is_partitioned
from llava.train import adapters
from llava.train.zero import full_shape


def set_trainable(model: Any, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """Set `requires_grad` by the table of §8.2; of the tower, what was asked for learns: positions, layers or all."""
    core = model.get_model()
    adapted = training_args.lora_enable
    model.requires_grad_(not (model_args.tune_mm_mlp_adapter or training_args.freeze_llm or adapted))
    if model_args.freeze_backbone:
        core.requires_grad_(False)
    if adapted:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(adapters.learns(name, training_args.lora_bias))
    if model_args.tune_mm_mlp_adapter and model_args.mm_use_im_start_end:
        model.get_input_embeddings().requires_grad_(True)
    tower = model.get_vision_tower()
    if tower is None:
        return
    core.mm_projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    tower.requires_grad_(False)
    if model_args.unfreeze_mm_vision_tower:
        unfreeze_tower(tower, model_args.unfreeze_mm_vision_layers)
    if model_args.tune_vit_pos_embedding:
        table = getattr(getattr(tower.vision_tower, "embeddings", None), "position_embedding", None)
        if not isinstance(table, torch.nn.Parameter):
            raise ConfigError(f"--tune_vit_pos_embedding needs an InternViT tower; {model_args.vision_tower} is none.")
        table.requires_grad_(True)


def unfreeze_tower(tower: Any, last: int) -> None:
    """Let the tower learn: all of it, or the `last` layers of those whose features are used."""
    if not last:
        tower.vision_tower.requires_grad_(True)
        return
    if tower.spec.layers is None or last > tower.depth:
        raise ConfigError(f"--unfreeze_mm_vision_layers {last}: {tower.name} has {tower.depth} layers that are used.")
    for name, parameter in tower.vision_tower.named_parameters():
        index = layer_index(name, tower.spec.layers)
        parameter.requires_grad_(index is not None and index >= tower.depth - last)


def set_precision(model: torch.nn.Module, compute_dtype: torch.dtype, *, engine: bool, packed: bool = False) -> None:
    """float32 masters for what learns, `compute_dtype` for what is frozen; under DeepSpeed all in `compute_dtype`.

    DeepSpeed keeps its own float32 masters; elsewhere autocast makes the 16-bit products. In a language model with
    `packed` weights the norms are float32 as well; those of the tower are not (T19).
    """
    for name, parameter in model.named_parameters():
        if not is_partitioned(parameter) and parameter.is_floating_point():
            norm = packed and "norm" in name and not any(part in name for part in adapters.OUTSIDE)
            master = (parameter.requires_grad or norm) and not engine
            parameter.data = parameter.data.to(torch.float32 if master else compute_dtype)


def as_saved(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """After training: everything in the dtype the published checkpoints have, half the size of the masters."""
    for parameter in model.parameters():
        if not is_partitioned(parameter) and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype)


def count(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers in trainable parameters, and in all; `TrainingError` if nothing would learn."""
    sizes = [(parameter.requires_grad, torch.Size(full_shape(parameter)).numel()) for parameter in model.parameters()]
    trainable = sum(size for learns, size in sizes if learns)
    if not trainable:
        raise TrainingError("These flags freeze every parameter, so nothing would be trained; drop a --freeze_* flag.")
    return trainable, sum(size for _, size in sizes)
