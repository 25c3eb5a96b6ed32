"""Files of `--meta_path`, which describe a mixture of datasets.

Samples are drawn uniformly from all datasets, each repeated `repeat_time` times.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from llava.data.annotations import SUFFIXES
from llava.errors import DataError, shorten

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
        meta = json.loads(Path(path).read_text(encoding="utf-8-sig"))
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
    if not isinstance(annotation, str) or Path(annotation).suffix.lower() not in SUFFIXES:
        problems.append(f"annotation is {shorten(repr(annotation))}, expected a file ending in {', '.join(SUFFIXES)}")
    if not isinstance(entry.get("root", ""), str) or "://" in entry.get("root", ""):
        problems.append(f"root is {shorten(repr(entry['root']))}, expected a local folder")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        problems.append(f"repeat_time is {repeats!r}, expected an integer of at least 1")
    return problems
