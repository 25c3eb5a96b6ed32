"""Metadata of a run in `run.json`: arguments, versions, commit, data and batch sizes, results."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import re
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import ModelCard, snapshot_download

from llava.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.errors import CheckpointError
from llava.files import write_text
from llava.provenance import git_commit, installed_versions
from llava.train.optimizer import RATE_FLAGS
from llava.utils import usable_cores

logger = logging.getLogger(__name__)
RUN_FILE: Final = "run.json"
FIXED: Final = ("samples", "data_bytes")  # a resumed run should not change them
PATH_FLAGS: Final = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "local_rank")
CARD_FILE: Final = "README.md"
LICENSE_KEYS: Final = ("license", "license_name", "license_link")
LICENSES: Final = {  # in the title of a license -> its name on the hub
    "APACHE LICENSE": "apache-2.0",
    "MIT LICENSE": "mit",
    "LLAMA 2 COMMUNITY LICENSE": "llama2",
    "LLAMA 3 COMMUNITY LICENSE": "llama3",
}
Flags = Mapping[str, Mapping[str, object]]


def to_json(arguments: ModelArguments | DataArguments | TrainingArguments) -> dict[str, object]:
    """An argument group as JSON values; `to_dict` of transformers masks secrets."""
    values = arguments.to_dict() if isinstance(arguments, TrainingArguments) else dict(vars(arguments))
    out: dict[str, object] = {}
    for field in dataclasses.fields(arguments):
        value = values.get(field.name)
        value = value.value if isinstance(value, Enum) else value
        out[field.name] = value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
    return out


def changed_flags(before: Flags, now: Flags) -> list[str]:
    """Flags whose value differs between two runs, each as `--name new (was old)`; paths of a run are left out."""
    return [
        f"--{name} {value} (was {before[group][name]})"
        for group, values in now.items()
        for name, value in values.items()
        if name not in PATH_FLAGS and before.get(group, {}).get(name, value) != value
    ]


def read_run(output_dir: Path) -> dict[str, Any]:
    """Contents of `run.json`, empty if it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def check_changes(checkpoint: Path, args: TrainingArguments) -> None:
    """Compare a run with the one that wrote `checkpoint`, as far as its `run.json` is there.

    Raises `CheckpointError` for other steps or loss groups, or parameter groups other than those of the optimizer
    state. Logs another number of processes.
    """
    before = read_run(checkpoint.parent)
    flags = before.get("arguments", {}).get("training", {})
    # Before loss groups had a flag, each micro-batch was one.
    groups = before.get("loss_group", flags.get("per_device_train_batch_size"))
    for flag, was in (("global_batch_size", before.get("global_batch")), ("loss_group_size", groups)):
        if was not in (None, getattr(args, flag)):
            raise CheckpointError(
                f"{checkpoint} is from a run with --{flag} {was}, but this run has {getattr(args, flag)}; pass "
                f"--{flag} {was}, or use another --output_dir."
            )
    for flag in RATE_FLAGS:
        if flags and (flags.get(flag) is None) != (getattr(args, flag) is None):
            raise CheckpointError(
                f"--{flag} was {flags.get(flag)} in the run of {checkpoint} and is {getattr(args, flag)} now, which "
                "needs another optimizer state; keep it, or use another --output_dir."
            )
    if (ranks := before.get("world_size", args.world_size)) != args.world_size:
        logger.info(
            "Resuming on %d processes instead of %d: each step takes the same records, and results agree up to "
            "rounding and dropout.",
            args.world_size,
            ranks,
        )


class RunMetadata:
    """Contents of `run.json`, written at the start and at the end of a run by one process."""

    def __init__(self, output_dir: Path, flags: Flags, **facts: object):
        self.output_dir, self.flags = output_dir, flags
        self.facts = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git_commit(),
            "versions": installed_versions(),
            "arguments": flags,
            **facts,
        }

    def warn_about_changes(self) -> None:
        """Log how this run differs from the one it resumes."""
        before = read_run(self.output_dir)
        if not self.facts.get("resumed_from") or not before:
            return
        for key in FIXED:
            if before.get(key) != self.facts.get(key):
                logger.warning(
                    "Resuming with %s %s instead of %s: the result will differ from an uninterrupted run.",
                    key,
                    self.facts.get(key),
                    before.get(key),
                )
        flags = changed_flags(before.get("arguments", {}), self.flags)
        if flags:
            logger.warning(
                "Resuming with other flags: %s; learning rate, weight decay and betas stay the checkpoint's.",
                ", ".join(flags),
            )

    def write(self, **more: object) -> None:
        self.facts.update(more)
        write_text(self.output_dir / RUN_FILE, json.dumps(self.facts, indent=2, sort_keys=True) + "\n")


# --- Machine and origin of the weights --------------------------------------------------------------------------------


def hardware(args: TrainingArguments) -> str:
    """The devices of a run, such as `8 x NVIDIA H100 80GB HBM3`."""
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    ranks = f", {args.world_size} processes" if args.world_size > 1 else ""
    return f"{args.device.type}: {platform.machine()}, {usable_cores()} cores{ranks}"


def sources(args: ModelArguments) -> dict[str, dict[str, str]]:
    """Hub name and license of the base model and of the vision tower, as far as they are known, by flag."""
    paths = {"model_name_or_path": args.model_name_or_path, "vision_tower": args.vision_tower}
    return {flag: source(path) for flag, path in paths.items() if path}


def source(path: str) -> dict[str, str]:
    """`hub`, and `license`, `license_name`, `license_link`, of weights in a directory or on the hub."""
    directory, found = Path(path), {}
    if not directory.is_dir():
        try:
            directory, found = Path(snapshot_download(path, local_files_only=True)), {"hub": path}
        except Exception:  # a name that is not of the hub
            return {}
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", str(directory.resolve()))
    if cached:
        found = {"hub": f"{cached[1]}/{cached[2]}"}
    return found | license_of(directory)


def license_of(directory: Path) -> dict[str, str]:
    """The license keys of the model card in a directory, else the license that its license file is."""
    try:
        data = ModelCard.load(directory / CARD_FILE, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, or one that cannot be read
        data = {}
    if isinstance(data.get("license"), str):
        return {key: str(data[key]) for key in LICENSE_KEYS if data.get(key)}
    for file in sorted(directory.glob("LICENSE*")):
        title = file.read_text(encoding="utf-8", errors="replace")[:400].upper()
        for words, name in LICENSES.items():
            if words in title:
                return {"license": name}
    return {}
