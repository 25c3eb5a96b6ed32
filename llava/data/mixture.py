"""Mixtures of datasets, described by a `--meta_path` file.

Samples are drawn uniformly from all datasets, each repeated `repeat_time` times.
"""

from __future__ import annotations

import bisect
import copy
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import ConcatDataset

from llava.conversation import Conversation
from llava.data.annotations import SUFFIXES
from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, Merge, check_supervision
from llava.data.labels import check_template
from llava.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.arguments import DataArguments

logger = logging.getLogger(__name__)
KEYS = ("annotation", "root", "repeat_time", "data_augment")


@dataclass(frozen=True)
class Entry:
    """A dataset of a mixture; `root` is the folder of its images."""

    name: str
    annotation: str
    root: str = ""
    repeat_time: int = 1


def read_mixture(path: str | Path) -> list[Entry]:
    """Read the entries of a mixture in file order; raises `DataError` with the problems of all entries."""
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read mixture {path}: {error}; check --meta_path.") from error
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"The mixture {path} holds {type(meta).__name__}; expected an object of named datasets.")
    problems = [f"{name}: {problem}" for name, entry in meta.items() for problem in _problems(entry)]
    if problems:
        raise DataError(f"The mixture {path} is invalid: {'; '.join(problems)}.")
    if any(entry.get("data_augment") for entry in meta.values()):
        logger.warning("%s: data_augment is ignored.", path)
    return [
        Entry(name, entry["annotation"], entry.get("root", ""), entry.get("repeat_time", 1))
        for name, entry in meta.items()
    ]


def _problems(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [f"the entry is {type(entry).__name__}, expected an object"]
    problems = [f"unknown key {key!r}, expected {', '.join(KEYS)}" for key in sorted(set(entry) - set(KEYS))]
    annotation, repeats = entry.get("annotation"), entry.get("repeat_time", 1)
    if not isinstance(annotation, str) or Path(annotation).suffix not in SUFFIXES:
        problems.append(f"annotation is {annotation!r}, expected a file ending in {', '.join(SUFFIXES)}")
    if not isinstance(entry.get("root", ""), str) or "://" in entry.get("root", ""):
        problems.append(f"root is {entry['root']!r}, expected a local folder")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        problems.append(f"repeat_time is {repeats!r}, expected an integer of at least 1")
    return problems


class MixtureDataset(ConcatDataset[dict[str, torch.Tensor]]):
    """Concatenation of the datasets of a mixture, each `repeat_time` times; items as in `LazySupervisedDataset`."""

    def __init__(
        self,
        entries: list[Entry],
        tokenizer: PreTrainedTokenizerBase,
        data_args: DataArguments,
        template: Conversation,
    ):
        self.parts: dict[str, LazySupervisedDataset] = {}
        for entry in entries:
            args = copy.copy(data_args)
            args.data_path, args.image_folder = entry.annotation, entry.root
            self.parts[entry.name] = LazySupervisedDataset(entry.annotation, tokenizer, args, template)
        super().__init__([self.parts[entry.name] for entry in entries for _ in range(entry.repeat_time)])
        for entry in entries:
            count, repeats = len(self.parts[entry.name]), entry.repeat_time
            logger.info("%s: %d samples x %d, %.2f %%", entry.name, count, repeats, 100 * count * repeats / len(self))

    def record_of(self, index: int) -> tuple[int, int]:
        """Identifier of the dataset and index in it of a sample; equal for all its repeats."""
        part = bisect.bisect_right(self.cumulative_sizes, index)
        return id(self.datasets[part]), index - (self.cumulative_sizes[part - 1] if part else 0)

    @cached_property
    def lengths(self) -> list[int]:
        return [length for part in self._repeated() for length in part.lengths]

    @cached_property
    def modality_lengths(self) -> list[int]:
        return [length for part in self._repeated() for length in part.modality_lengths]

    def _repeated(self) -> list[LazySupervisedDataset]:
        return cast("list[LazySupervisedDataset]", self.datasets)

    def check(self, *, wait: bool = False) -> bool:
        """Whether the scans of all datasets are complete; raises as `LazySupervisedDataset.check` does."""
        complete = [part.check(wait=wait) for part in self.parts.values()]  # checks all of them
        return all(complete)

    def report(self, merge: Merge = torch.Tensor.long) -> dict[str, int]:
        """Sum of the datasets' reports, without repeats."""
        reports = [part.report(merge) for part in self.parts.values()]
        return {key: sum(report[key] for report in reports) for key in reports[0]}


def make_mixture_module(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, template: Conversation
) -> dict[str, Any]:
    """Dataset and collator for `data_args.meta_path`, as from `make_supervised_data_module`."""
    check_template(tokenizer, template)
    dataset = MixtureDataset(read_mixture(data_args.meta_path or ""), tokenizer, data_args, template)
    for part in dataset.parts.values():
        check_supervision(part)
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}
