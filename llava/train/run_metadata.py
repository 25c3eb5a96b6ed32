"""Metadata of a run in `run.json`: arguments, versions, commit, data and batch sizes, results."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Final

from llava.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.files import write_text
from llava.provenance import git_commit, installed_versions

logger = logging.getLogger(__name__)
FIXED: Final = ("global_batch", "samples", "data_bytes", "world_size")  # a resumed run must not change them
PATH_FLAGS: Final = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "local_rank")
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


class RunMetadata:
    """Contents of `run.json`, written at the start and at the end of a run by one process."""

    def __init__(self, path: Path, flags: Flags, **facts: object):
        self.path, self.flags = path, flags
        self.facts = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git_commit(),
            "versions": installed_versions(),
            "arguments": flags,
            **facts,
        }

    def warn_about_changes(self) -> None:
        """Log how this run differs from the one it resumes."""
        if not self.facts.get("resumed_from") or not self.path.is_file():
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
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
        write_text(self.path, json.dumps(self.facts, indent=2, sort_keys=True) + "\n")
