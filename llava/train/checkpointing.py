"""Directories of a run: which `checkpoint-N` can be resumed, is there room, can this model be saved at all.

A checkpoint is written as `tmp-checkpoint-N` and renamed when whole; anything else is ignored by resuming, and said so.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.errors import CheckpointError, TrainingError
from llava.model.checkpoint import load_bin
from llava.train import weights

logger = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"
DRY_RUN = "tmp-save-test"


def step_of(directory: Path) -> int | None:
    """N of `checkpoint-N`, or None for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", directory.name)
    return int(found[1]) if found else None


def incomplete(directory: Path) -> str | None:
    """Why training cannot go on from this directory, or None if it can."""
    empty = [file.name for file in sorted(directory.rglob("*")) if file.is_file() and file.stat().st_size == 0]
    if empty:
        return f"{empty[0]} is empty"
    try:
        json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{STATE_FILE} is missing or damaged"
    if not (directory / "config.json").is_file():
        return "config.json is missing"
    engine = (directory / "latest").is_file()
    if engine and not (directory / (directory / "latest").read_text().strip()).is_dir():
        return "the DeepSpeed folder is missing"
    if not engine and not (directory / "optimizer.pt").is_file():
        return "it holds no optimizer state"
    if not any(directory.glob("rng_state*.pth")):
        return "it holds no random state"
    try:
        weights.stored_shapes(directory)
    except CheckpointError as error:
        return f"its weights cannot be read: {error}"
    return None


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete `checkpoint-N`; each incomplete one is named in the log."""
    if not output_dir.is_dir():
        return None
    for left in sorted(output_dir.glob("tmp-checkpoint-*")):
        logger.warning("Ignoring %s: it was being written when an earlier run stopped.", left)
    found = [(step_of(d), d) for d in output_dir.glob("checkpoint-*") if d.is_dir() and step_of(d) is not None]
    for _, directory in sorted(found, reverse=True):
        why = incomplete(directory)
        if why is None:
            return directory
        logger.warning("Ignoring %s: %s.", directory, why)
    return None


def resume_from(output_dir: Path, requested: str | None) -> Path | None:
    """The checkpoint to go on from: the one asked for, else the newest complete one of `output_dir`."""
    if requested is None or requested.lower() == "true":
        return latest_checkpoint(output_dir)
    if requested.lower() == "false":
        return None
    directory = Path(requested)
    if not directory.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint names {directory}, which is not a directory.")
    why = incomplete(directory)
    if why:
        raise CheckpointError(f"--resume_from_checkpoint names {directory}, but {why}; give a complete checkpoint-N.")
    return directory


def read_state(file: Path, what: str) -> Any:
    """Plain data and tensors of a file, memory-mapped; one that would run code is refused."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read as {what} ({type(error).__name__}): it is damaged, or would run code; resume from "
            "another checkpoint."
        ) from error


def check_fits(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if a checkpoint's weights are not those of this model, which would go on with some of its own."""
    found = weights.stored_shapes(directory)
    other = next((name for name in sorted(expected) if found.get(name) != tuple(expected[name])), None)
    if other:
        what = f"{found[other]} and not {tuple(expected[other])}" if other in found else "missing"
        raise CheckpointError(
            f"{directory} is of a run with another model: {other} is {what}. Use the flags of that run, "
            "or give another --output_dir."
        )


def check_optimizer(directory: Path, *, engine: bool, zero3: bool, processes: int) -> None:
    """Raise unless this run can read the optimizer's state: libraries end in a traceback, or go on without one."""
    latest = directory / "latest"
    folder = directory / latest.read_text().strip() if latest.is_file() else directory
    parts = len(list(folder.glob("*_optim_states.pt")))
    found = _keeper(latest.is_file(), any(folder.glob("zero_pp_rank_*_model_states.pt")), parts)
    wanted = _keeper(engine, zero3, processes if parts else 0)
    if found != wanted:
        raise CheckpointError(
            f"{directory} holds the optimizer's state of a run {found}, and this one is {wanted}; start it as before, "
            "or begin another in another --output_dir."
        )


def _keeper(engine: bool, zero3: bool, processes: int) -> str:
    if not engine:
        return "without DeepSpeed"
    shared = f" by {processes} processes" if processes else ""
    return f"with DeepSpeed{shared}, weights {'partitioned (stage 3)' if zero3 else 'whole'}"


def sanitise_generation_config(model: Any) -> None:
    """Drop sampling parameters from a greedy configuration, as Vicuna's is; saving it fails or is skipped otherwise."""
    config = getattr(model, "generation_config", None)
    if config is not None and not config.do_sample:
        config.temperature, config.top_p, config.top_k, config.typical_p = 1.0, 1.0, 50, 1.0


def dry_run(output_dir: Path, model: Any, tokenizer: Any) -> None:
    """Write and delete all a save writes but the large tensors: hour 20 is not the first time (SAVE-1)."""
    directory = output_dir / DRY_RUN
    try:
        directory.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        torch.save({"probe": torch.ones(2)}, directory / "probe.bin")
        if not torch.equal(load_bin(directory / "probe.bin")["probe"], torch.ones(2)):
            raise TrainingError(f"A tensor written to {output_dir} reads back differently; use another --output_dir.")
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"This run could not be saved to {output_dir}: {error}; mend it or change --output_dir."
        ) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_room(output_dir: Path, final_bytes: int, checkpoint_bytes: int, kept: int | None) -> None:
    """Raise if the disk cannot take one checkpoint and the final weights; warn if not all that will be kept."""
    free = shutil.disk_usage(output_dir).free
    least, most = final_bytes + checkpoint_bytes, final_bytes + checkpoint_bytes * ((kept or 0) + 1)
    if free < least:
        raise TrainingError(
            f"{output_dir} has {free / 2**30:.1f} GiB free, but this run needs {least / 2**30:.1f} GiB for "
            "a checkpoint and the final weights; free space or choose another --output_dir."
        )
    if kept is not None and free < most:
        logger.warning("%s has %.1f GiB free; all kept checkpoints need %.1f.", output_dir, free / 2**30, most / 2**30)


def random_state() -> dict[str, Any]:
    """All generators' states as plain numbers and tensors, readable with `weights_only=True` by any torch (M36)."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
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
