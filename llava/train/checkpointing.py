"""Checkpoints of a run: writing and verifying them, finding one to resume from, random state, disk space.

A checkpoint is written to `tmp-checkpoint-N` and renamed when complete; resuming ignores anything else and logs why.
`model_setup.saved_parameters` decides which tensors a checkpoint holds.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.errors import CheckpointError, TrainingError
from llava.files import atomic_write
from llava.model.checkpoint import (
    ADAPTER_CONFIG,
    NON_LORA_FILE,
    PROJECTOR_FILE,
    has_tensors,
    has_weights,
    iter_tensors,
    load_bin,
    read_tensors,
    weight_shapes,
)
from llava.model.lora import ADAPTER_FILES, ADAPTER_PREFIX, adapter_shapes, read_adapter, read_non_lora
from llava.model.saving import savable_generation_config, write_tensors
from llava.train import zero
from llava.train.model_setup import ADAPTER, SaveFormat, saved_parameters, saved_shapes

logger = logging.getLogger(__name__)
STATE_FILE: Final = "trainer_state.json"
DRY_RUN: Final = "tmp-save-test"
Shapes = Mapping[str, tuple[int, ...]]


# --- Writing and reading weights --------------------------------------------------------------------------------------


def save_projector(model: PreTrainedModel, directory: Path, *, final: bool, is_writer: bool) -> None:
    """Write `config.json` and the projector; collective under ZeRO-3, ranks with `is_writer` write."""
    state = zero.gather_state_dict(saved_parameters(model, "projector"), is_writer=is_writer)
    if is_writer:
        model.config.save_pretrained(directory)
        write_tensors(projector_file(directory, final=final), state)


def projector_file(directory: Path, *, final: bool) -> Path:
    """`mm_projector.bin`, or as published `../mm_projector/checkpoint-N.bin` for the final save to `checkpoint-N`."""
    if final and directory.name.startswith("checkpoint-"):
        return directory.parent / "mm_projector" / f"{directory.name}.bin"
    return directory / PROJECTOR_FILE


def save_lora(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, is_writer: bool) -> None:
    """Write and verify everything a loader needs except the base model; collective under ZeRO-3.

    Adapter, `non_lora_trainables`, configuration and tokenizer; ranks with `is_writer` write.
    """
    state = zero.gather_state_dict(saved_parameters(model, "lora"), is_writer=is_writer)
    if not is_writer:
        return
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = copy.copy(model.peft_config[ADAPTER])
    settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
    settings.save_pretrained(str(directory))
    with atomic_write(directory / ADAPTER_FILES[0]) as part:
        save_file({name: value for name, value in state.items() if ".lora_" in name}, part, metadata={"format": "pt"})
    write_tensors(directory / NON_LORA_FILE, {name: value for name, value in state.items() if ".lora_" not in name})
    verify(directory, saved_shapes(model, "lora"))


def load_lora(model: PreTrainedModel, directory: Path) -> None:
    """Load what `save_lora` wrote into the model in training; file and model must hold the same tensors."""
    parameters = dict(saved_parameters(model, "lora"))
    state = dict(stored_weights(directory, "lora"))
    missing = sorted(set(parameters) - set(state))
    if missing:
        raise CheckpointError(
            f"{missing[0]} is missing in {directory}, but these flags train it; use the flags of the interrupted run."
        )
    copy_tensors(parameters, state, str(directory))


def load_projector(model: PreTrainedModel, directory: Path) -> None:
    """Load what `save_projector` wrote into the model in training."""
    copy_tensors(dict(model.named_parameters()), dict(stored_weights(directory, "projector")))


def stored_weights(directory: Path, saves: SaveFormat) -> Iterator[tuple[str, Tensor]]:
    """Weights of a checkpoint by the names of `saved_parameters`; those of a full model are read one by one."""
    if saves == "full":
        yield from iter_tensors(directory, lambda name: True)
    elif saves == "projector":
        yield from read_tensors(directory / PROJECTOR_FILE).items()
    else:
        yield from read_adapter(directory).items()
        yield from ((ADAPTER_PREFIX + name, value) for name, value in read_non_lora(directory).items())


def copy_tensors(
    parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], source: str = "The projector file"
) -> None:
    """Copy tensors into the (unpartitioned) parameters of the same names; raises for unknown names or shapes."""
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise CheckpointError(f"{source} has tensors that are not in this model: {', '.join(unknown[:4])}.")
    with torch.no_grad():
        for name, value in state.items():
            if parameters[name].shape != value.shape:
                found, expected = tuple(value.shape), tuple(parameters[name].shape)
                raise CheckpointError(f"{source}: {name} is {found}, but this model needs {expected}.")
            parameters[name].copy_(value)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a full model, a projector file or an adapter, read from the file headers."""
    if (directory / ADAPTER_CONFIG).is_file():
        non_lora = {ADAPTER_PREFIX + name: tuple(value.shape) for name, value in read_non_lora(directory).items()}
        return adapter_shapes(directory) | non_lora
    if not has_weights(directory) and has_tensors(directory / PROJECTOR_FILE):
        return {name: tuple(value.shape) for name, value in read_tensors(directory / PROJECTOR_FILE).items()}
    return weight_shapes(directory)


def verify(directory: Path, expected: Shapes) -> None:
    """Re-read the headers of saved weights; raises unless all `expected` tensors are there and none is empty."""
    found = stored_shapes(directory)
    faults = {
        "missing": sorted(set(expected) - set(found)),
        "of another shape": sorted(k for k in set(expected) & set(found) if tuple(expected[k]) != found[k]),
        "empty": sorted(k for k, shape in found.items() if 0 in shape),
    }
    text = ", ".join(f"{len(names)} {fault} ({names[0]})" for fault, names in faults.items() if names)
    if text:
        raise CheckpointError(f"The weights just saved to {directory} are not those of the model: {text}.")


# --- Checks at the start of a run -------------------------------------------------------------------------------------


def dry_run(output_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write, re-read and delete everything a save writes except the large tensors, so that a fault shows at once."""
    directory = output_dir / DRY_RUN
    try:
        directory.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(directory)
        if (generation := getattr(model, "generation_config", None)) is not None:
            savable_generation_config(generation).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        torch.save({"probe": torch.ones(2)}, directory / "probe.bin")
        if not torch.equal(load_bin(directory / "probe.bin")["probe"], torch.ones(2)):
            raise TrainingError(f"A tensor written to {output_dir} reads back differently; use another --output_dir.")
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"This run could not be saved to {output_dir}: {error}; fix it or change --output_dir."
        ) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_disk_space(output_dir: Path, final_bytes: int, checkpoint_bytes: int, save_total_limit: int | None) -> None:
    """Raise if the disk cannot hold one checkpoint and the final weights; warn if not all checkpoints to be kept."""
    free = shutil.disk_usage(output_dir).free
    least = final_bytes + checkpoint_bytes
    most = final_bytes + checkpoint_bytes * ((save_total_limit or 0) + 1)
    if free < least:
        raise TrainingError(
            f"{output_dir} has {free / 2**30:.1f} GiB free, but this run needs {least / 2**30:.1f} GiB for "
            "a checkpoint and the final weights; free space or choose another --output_dir."
        )
    if save_total_limit is not None and free < most:
        logger.warning(
            "%s has %.1f GiB free; all kept checkpoints need %.1f GiB.", output_dir, free / 2**30, most / 2**30
        )


# --- Resuming ---------------------------------------------------------------------------------------------------------


def incomplete(directory: Path) -> str | None:
    """The reason why training cannot resume from a directory, or None if it can."""
    empty = [file.name for file in sorted(directory.rglob("*")) if file.is_file() and file.stat().st_size == 0]
    if empty:
        return f"{empty[0]} is empty"
    try:
        json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{STATE_FILE} is missing or damaged"
    if not (directory / "config.json").is_file():
        return "config.json is missing"
    deepspeed = (directory / "latest").is_file()
    if deepspeed and not (directory / (directory / "latest").read_text().strip()).is_dir():
        return "the DeepSpeed folder is missing"
    if not deepspeed and not (directory / "optimizer.pt").is_file():
        return "it holds no optimizer state"
    if not any(directory.glob("rng_state*.pth")):
        return "it holds no random state"
    try:
        stored_shapes(directory)
    except CheckpointError as error:
        return f"its weights cannot be read: {error}"
    return None


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete `checkpoint-N`; logs each incomplete one that is skipped."""
    if not output_dir.is_dir():
        return None
    for unfinished in sorted(output_dir.glob("tmp-checkpoint-*")):
        logger.warning("Ignoring %s: an earlier run stopped while writing it.", unfinished)
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    for _, directory in sorted(((int(name[1]), path) for name, path in names if name and path.is_dir()), reverse=True):
        reason = incomplete(directory)
        if reason is None:
            return directory
        logger.warning("Ignoring %s: %s.", directory, reason)
    return None


def global_step(checkpoint: Path) -> int:
    """Number of steps that a checkpoint has done."""
    return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def checkpoint_to_resume(output_dir: Path, requested: str | None) -> Path | None:
    """The checkpoint of `--resume_from_checkpoint`: a directory, "false", or "true" (the default) for the newest."""
    if requested is None or requested.lower() == "true":
        return latest_checkpoint(output_dir)
    if requested.lower() == "false":
        return None
    directory = Path(requested)
    if not directory.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint must be a checkpoint directory, got {directory}.")
    reason = incomplete(directory)
    if reason:
        raise CheckpointError(
            f"--resume_from_checkpoint {directory} is incomplete: {reason}; pass a complete checkpoint-N."
        )
    return directory


def check_weights(directory: Path, expected: Shapes) -> None:
    """Raise unless a checkpoint holds all `expected` tensors: resuming would otherwise mix it with fresh weights."""
    found = stored_shapes(directory)
    other = next((name for name in sorted(expected) if found.get(name) != tuple(expected[name])), None)
    if other:
        what = f"{found[other]} and not {tuple(expected[other])}" if other in found else "missing"
        raise CheckpointError(
            f"{directory} is from a run with another model: {other} is {what}; use the flags of that run, "
            "or another --output_dir."
        )


def load_state(file: Path, what: str, *, mmap: bool = True) -> Any:
    """Load tensors and plain data to the CPU; a damaged file, or one that would run code, raises."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read as {what} ({type(error).__name__}): it is damaged, or would run code; resume from "
            "another checkpoint."
        ) from error


def random_state() -> dict[str, Any]:
    """States of all random generators as numbers and tensors, readable with `weights_only=True`."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    numpy_keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "python": random.getstate(),
        "numpy": (str(name), numpy_keys, int(position), int(has_gauss), float(cached)),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned.

    If the number of CUDA devices differs from the checkpoint's, the devices in both are restored, with a warning.
    """
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    saved = state.get("cuda", [])
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) != visible:
        logger.warning(
            "The checkpoint holds the random state of %d CUDA device(s) and %d are visible: the resumed run will not "
            "reproduce the original exactly. To reproduce it, resume with the same number of visible devices.",
            len(saved),
            visible,
        )
    for device, device_state in zip(range(visible), saved):
        torch.cuda.random.set_rng_state(device_state, device)
