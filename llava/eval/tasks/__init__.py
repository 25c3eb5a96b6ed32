"""The benchmarks `llava eval` knows, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from llava.errors import ConfigError
from llava.eval.tasks.base import Task
from llava.eval.tasks.easy_vqa import EasyVQA
from llava.eval.tasks.mme import Mme
from llava.eval.tasks.pope import Pope
from llava.eval.tasks.science_qa import ScienceQA
from llava.eval.tasks.textvqa import TextVQA

TASKS: Final[dict[str, type[Task]]] = {task.name: task for task in (EasyVQA, Mme, Pope, ScienceQA, TextVQA)}


def make_task(name: str, data_root: Path | None = None, split: str | None = None) -> Task:
    """The task of that name; `split` defaults to the one scores are published for."""
    if name not in TASKS:
        raise ConfigError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    task = TASKS[name]
    if split is not None and split not in task.splits:
        raise ConfigError(f"Task {name} has no split {split!r}; choose from {', '.join(task.splits)}.")
    return task(data_root, split or task.splits[0])
