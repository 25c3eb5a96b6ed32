"""The registry of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llava.errors import ConfigError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.easy_vqa import EasyVQA
from llava.eval.benchmarks.gqa import Gqa
from llava.eval.benchmarks.judged import LlavaBench, LlavaBenchCoco, MMVet
from llava.eval.benchmarks.mmbench import MMBench, MMBenchCN
from llava.eval.benchmarks.mme import Mme
from llava.eval.benchmarks.pope import Pope
from llava.eval.benchmarks.science_qa import ScienceQA
from llava.eval.benchmarks.seed import SeedBench
from llava.eval.benchmarks.textvqa import TextVQA
from llava.eval.benchmarks.vqa import VizWiz, VQAv2

_CLASSES: Final[tuple[type[Task], ...]] = (
    *(VQAv2, Gqa, VizWiz, ScienceQA, TextVQA, Pope, Mme, MMBench, MMBenchCN),
    *(SeedBench, LlavaBench, LlavaBenchCoco, MMVet, EasyVQA),
)
TASKS: Final[dict[str, type[Task]]] = {task.name: task for task in _CLASSES}
ALL: Final = "all"


def make_task(name: str, data_root: Path | None = None, split: str | None = None) -> Task:
    """A task by name; `split` defaults to the one with published scores."""
    if name not in TASKS:
        raise ConfigError(f"Unknown task {name!r}; choose from {', '.join(TASKS)}, {ALL}.")
    task = TASKS[name]
    split = split or next(iter(task.layouts))
    if split not in task.layouts:
        raise ConfigError(f"Task {name} has no split {split!r}; choose from {', '.join(task.layouts)}.")
    return task(data_root, split)


def make_tasks(
    names: Sequence[str], data_root: Path | None = None, split: str | None = None, eval_data: Path | None = None
) -> list[Task]:
    """The named tasks without duplicates; `all` stands for every task.

    `data_root` is the data folder of a single task, `eval_data` the parent folder of all.
    """
    stripped = [name.strip() for name in names]
    wanted = list(dict.fromkeys(each for name in stripped for each in (TASKS if name == ALL else [name])))
    if data_root is not None and len(wanted) > 1:
        raise ConfigError(f"--data-root is the folder of one task, got {len(wanted)} tasks; use --eval-data.")
    tasks = [make_task(name, data_root, split) for name in wanted]
    for task in tasks:
        if data_root is None and eval_data is not None:
            task.data_root = task.default_root(eval_data)
    return tasks
