"""Several data sets as one: the `--meta_path` file (spec/train.md §3.2).

A data set enters `repeat_time` times, and training draws uniformly over all that entered (T10): the share of a set is
its length times its repeats.
"""

from __future__ import annotations

import bisect
import copy
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from llava.conversation import Conversation
from llava.data.annotations import SUFFIXES
from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, Merge, check_supervision
from llava.data.labels import check_template
from llava.errors import DataError

logger = logging.getLogger(__name__)
KEYS = ("annotation", "root", "repeat_time", "data_augment")


@dataclass(frozen=True)
class Entry:
    """One data set of a mixture; `root` is put before each image path."""

    name: str
    annotation: str
    root: str = ""
    repeat_time: int = 1


def read_mixture(path: str | Path) -> list[Entry]:
    """The entries in file order; `DataError` with every problem of every entry."""
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The mixture {path} cannot be read: {error}; check --meta_path.") from error
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"The mixture {path} holds {type(meta).__name__}; expected an object of named data sets.")
    problems = [f"{name}: {problem}" for name, entry in meta.items() for problem in _problems(entry)]
    if problems:
        raise DataError(f"The mixture {path} has faults: {'; '.join(problems)}.")
    if any(entry.get("data_augment") for entry in meta.values()):
        logger.warning("%s: data_augment has no effect.", path)
    return [
        Entry(name, entry["annotation"], entry.get("root", ""), entry.get("repeat_time", 1))
        for name, entry in meta.items()
    ]


def _problems(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [f"it is {type(entry).__name__}, expected an object"]
    problems = [f"key {key!r} is unknown, expected {', '.join(KEYS)}" for key in sorted(set(entry) - set(KEYS))]
    annotation, repeats = entry.get("annotation"), entry.get("repeat_time", 1)
    if not isinstance(annotation, str) or Path(annotation).suffix not in SUFFIXES:
        problems.append(f"annotation is {annotation!r}, expected a file named {', '.join(SUFFIXES)}")
    if not isinstance(entry.get("root", ""), str) or "://" in entry.get("root", ""):
        problems.append(f"root is {entry['root']!r}, expected a local folder")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        problems.append(f"repeat_time is {repeats!r}, expected a whole number from 1")
    return problems


class MixtureDataset(ConcatDataset[dict[str, torch.Tensor]]):
    """The data sets of a mixture one after the other, each `repeat_time` times; items as of `LazySupervisedDataset`."""

    def __init__(self, entries: list[Entry], tokenizer: Any, data_args: Any, template: Conversation):
        self.parts = {entry.name: _dataset(entry, tokenizer, data_args, template) for entry in entries}
        super().__init__([self.parts[entry.name] for entry in entries for _ in range(entry.repeat_time)])
        for entry in entries:
            share = len(self.parts[entry.name]) * entry.repeat_time / len(self)
            logger.info(
                "%s: %d samples x %d, %.2f %%", entry.name, len(self.parts[entry.name]), entry.repeat_time, 100 * share
            )

    def record_of(self, place: int) -> tuple[int, int]:
        """Which record stands at a place: a data set, and a place in it; the same for all repeats."""
        part = bisect.bisect_right(self.cumulative_sizes, place)
        return id(self.datasets[part]), place - (self.cumulative_sizes[part - 1] if part else 0)

    @cached_property
    def lengths(self) -> list[int]:
        return [length for part in self.datasets for length in part.lengths]  # type: ignore[attr-defined]

    @cached_property
    def modality_lengths(self) -> list[int]:
        return [length for part in self.datasets for length in part.modality_lengths]  # type: ignore[attr-defined]

    def check(self, *, wait: bool = False) -> bool:
        """Whether all records of all parts are known to be good; raises as `LazySupervisedDataset.check` does."""
        known = [part.check(wait=wait) for part in self.parts.values()]  # every part is asked, also after a no
        return all(known)

    def report(self, merge: Merge = torch.Tensor.long) -> dict[str, int]:
        """Sums of the parts' reports; a repeated part counts once."""
        reports = [part.report(merge) for part in self.parts.values()]
        return {key: sum(report[key] for report in reports) for key in reports[0]}


def _dataset(entry: Entry, tokenizer: Any, data_args: Any, template: Conversation) -> LazySupervisedDataset:
    own = copy.copy(data_args)
    own.data_path, own.image_folder = entry.annotation, entry.root
    return LazySupervisedDataset(entry.annotation, tokenizer, own, template)


def make_mixture_module(tokenizer: Any, data_args: Any, template: Conversation) -> dict[str, Any]:
    """What `make_supervised_data_module` makes, for `data_args.meta_path`."""
    check_template(tokenizer, template)
    dataset = MixtureDataset(read_mixture(data_args.meta_path), tokenizer, data_args, template)
    for part in dataset.parts.values():
        check_supervision(part)
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
