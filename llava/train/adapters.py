"""LoRA runs (arXiv:2106.09685; spec/train.md §9.1): adapters on the decoder, what learns beside them, their directory.

Every directory written is whole by itself (users.md LORA-1): adapter and its settings, the fully trained weights of the
same step, configuration and tokenizer. `llava.model.lora` reads it back.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.arguments import ModelArguments, TrainingArguments
from llava.errors import CheckpointError
from llava.model.checkpoint import NON_LORA_FILE
from llava.model.lora import ADAPTER_FILES, ADAPTER_PREFIX, read_non_lora
from llava.train import weights, zero
from llava.train.weights import Named
from llava.utils import require

logger = logging.getLogger(__name__)
OUTSIDE = ("mm_projector", "vision_tower", "vision_resampler", "lm_head")
NAME = "default"


def linear_names(model: nn.Module) -> list[str]:
    """Last name components of the decoder's linear layers, packed ones included; never tower, projector, head (T17)."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not any(part in name for part in OUTSIDE)
        }
    )


def wrap(model: Any, model_args: ModelArguments, args: TrainingArguments) -> Any:
    """The PEFT model around `model`, to be called before the tower is loaded: its layers may be named alike.

    PEFT is told of no bias (`lora_bias`): those that learn are saved beside the adapter, and the tower's never do (T4).
    """
    peft = require("peft", "train")
    settings = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=linear_names(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)  # packed layers too: PEFT's own class for them lags bitsandbytes
    settings.base_model_name_or_path = model_args.model_name_or_path
    snapshot = Path(model.config._name_or_path)
    if snapshot.parent.name == "snapshots":  # of the hub's cache: the folder is named by its commit
        settings.revision = snapshot.name
    logger.info("LoRA of rank %d on %s.", args.lora_r, ", ".join(sorted(settings.target_modules)))
    return adapted


def learns(name: str, bias: str) -> bool:
    """Whether a parameter of the wrapped language model learns under `--lora_bias`."""
    if any(part in name for part in OUTSIDE):
        return False
    of_target = name.endswith(".base_layer.bias")
    return ".lora_" in name or (bias == "lora_only" and of_target) or (bias == "all" and name.endswith("bias"))


def saved_parameters(model: Any) -> tuple[Named, Named]:
    """Adapter, and the rest that base and adapter lack, by their names in the files.

    The rest is what else learns, the projector in any case, and the embeddings when image tokens gave them new rows.
    """
    config = model.config
    beside = ["mm_projector", "vision_resampler"]
    if getattr(config, "mm_use_im_start_end", False) or getattr(config, "mm_use_im_patch_token", False):
        beside += ["embed_tokens", "wte", "lm_head"]
    adapter, rest = [], []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapter.append((name.replace(f".{NAME}.", "."), parameter))
        elif parameter.requires_grad or any(part in name for part in beside):
            rest.append((name.replace(".base_layer.", "."), parameter))
    return adapter, rest


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a directory of this run must hold."""
    adapter, rest = saved_parameters(model)
    return weights.shapes(adapter + rest)


def save(model: Any, tokenizer: Any, directory: Path, *, keep: bool) -> None:
    """Write all a loader needs beside the base, and verify it; collective under ZeRO-3, ranks with `keep` write."""
    adapter, rest = (zero.collect(named, keep=keep) for named in saved_parameters(model))
    if not keep:
        return
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = copy.copy(model.peft_config[NAME])
    settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
    settings.save_pretrained(str(directory))
    file = directory / ADAPTER_FILES[0]
    part = file.with_name(file.name + ".part")
    save_file(adapter, part, metadata={"format": "pt"})
    part.replace(file)
    weights.write_bin(directory / NON_LORA_FILE, rest)
    weights.verify(directory, shapes(model))


def load(model: Any, directory: Path) -> None:
    """Put what `save` wrote back into the model in training; every tensor must find its place, and every place one."""
    adapter, rest = saved_parameters(model)
    state: dict[str, torch.Tensor] = load_file(directory / ADAPTER_FILES[0])
    state |= {ADAPTER_PREFIX + name: value for name, value in read_non_lora(directory).items()}
    missing = sorted({name for name, _ in adapter + rest} - set(state))
    if missing:
        raise CheckpointError(f"{directory} lacks {missing[0]}, which learns with these flags; use those of its run.")
    weights.copy_named(dict(adapter + rest), state, str(directory))
