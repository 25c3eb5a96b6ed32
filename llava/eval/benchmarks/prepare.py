"""Say, for each benchmark, which of its files are here, which are missing, and where those come from.

    llava eval prepare [TASK ...] [--eval-data DIR] [--checksums]

Nothing is downloaded. The exit status is 1 when something is missing or a file has another number of questions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import LlavaError
from llava.eval.benchmarks.base import RequiredFile, Task
from llava.eval.benchmarks.registry import ALL, TASKS, make_tasks
from llava.eval.run.manifest import file_digest
from llava.utils import guarded


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data are, for `llava eval` too."""
    default = os.environ.get("EVAL_DATA", "playground/data/eval")
    parser.add_argument("--split", help="of the data (default: the one scores are published for)")
    parser.add_argument("--data-root", type=Path, help="folder of the one benchmark asked for")
    parser.add_argument(
        "--eval-data", type=Path, default=Path(default), help="folder of all benchmarks (EVAL_DATA; %(default)s)"
    )


def state(need: RequiredFile, checksums: bool) -> str:
    """One line about a file or folder."""
    if need.missing:
        return f"  missing  {need.path}\n           from {need.source}"
    sha256 = f"  sha256 {file_digest(need.path)}" if checksums and need.path.is_file() else ""
    return f"  here     {need.path}{sha256}"


def check(task: Task, checksums: bool = False) -> tuple[list[str], bool]:
    """What there is to say about a benchmark, and whether it can be run as published."""
    needs = task.needs()
    lines = [state(need, checksums) for need in needs]
    if any(need.missing for need in needs):
        return [f"{task.name}: not ready", *lines], False
    try:
        found = len(task.questions())
    except LlavaError as error:
        return [f"{task.name}: not ready", *lines, f"  damaged  {error}"], False
    wanted = task.published_rows
    if wanted is not None and found != wanted:
        return [f"{task.name}: {found} questions, {wanted} are published", *lines], False
    return [f"{task.name}: ready, {found} questions", *lines], True


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llava eval prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[ALL], metavar="TASK", help=f"of: {', '.join(TASKS)} (default all)")
    add_data_flags(parser)
    parser.add_argument("--checksums", action="store_true", help="print the sha256 of every file")
    args = parser.parse_args(argv)
    names = [name for word in args.tasks for name in word.split(",")]
    ready = True
    for task in make_tasks(names, args.data_root, args.split, args.eval_data):
        lines, whole = check(task, args.checksums)
        ready = ready and whole
        print("\n".join(lines))
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
