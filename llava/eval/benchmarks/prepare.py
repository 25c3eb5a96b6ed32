"""List the files of each benchmark, which of them are missing, and where to download them.

    llava eval prepare [TASK ...] [--eval-data DIR] [--checksums]
    llava eval prepare TASK ... --lmms-eval PYTHON [--output-dir DIR]     write local tasks for lmms-eval

Nothing is downloaded. The exit status is 1 if a file is missing or has an unexpected number of questions.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from llava.errors import LlavaError
from llava.eval.benchmarks.base import EVAL_DATA, RequiredFile, Task
from llava.eval.benchmarks.lmms_tasks import write_tasks
from llava.eval.benchmarks.registry import ALL, TASKS, make_tasks
from llava.provenance import file_digest
from llava.utils import guarded


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that locate the data."""
    add = parser.add_argument
    default = Path(os.environ.get("EVAL_DATA", EVAL_DATA))
    add("--split", help="split of the benchmark (default: the one with published scores)")
    add("--data-root", type=Path, help="data folder of a single benchmark")
    add("--eval-data", type=Path, default=default, help="parent folder of all benchmarks (EVAL_DATA; %(default)s)")


def describe_file(file: RequiredFile, checksums: bool) -> str:
    """State and path of a file or folder, and its source if it is missing."""
    if file.missing:
        return f"  missing  {file.path}\n           from {file.source}"
    sha256 = f"  sha256 {file_digest(file.path)}" if checksums and file.path.is_file() else ""
    return f"  found    {file.path}{sha256}"


def check_task(task: Task, checksums: bool = False) -> tuple[list[str], bool]:
    """A report on the files of a benchmark, and whether it is ready to run as published."""
    files = task.required_files()
    lines = [describe_file(file, checksums) for file in files]
    if any(file.missing for file in files):
        return [f"{task.name}: not ready", *lines], False
    try:
        count = len(task.questions())
    except LlavaError as error:
        return [f"{task.name}: not ready", *lines, f"  damaged  {error}"], False
    if count != task.published_rows:
        return [f"{task.name}: {count} questions, expected {task.published_rows}", *lines], False
    return [f"{task.name}: ready, {count} questions", *lines], True


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llava eval prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[ALL], metavar="TASK", help=f"of: {', '.join(TASKS)} (default all)")
    add_data_flags(parser)
    parser.add_argument("--checksums", action="store_true", help="print the sha256 of every file")
    parser.add_argument("--lmms-eval", metavar="PYTHON", help="interpreter of the environment with lmms-eval")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("lmms_tasks"), help="folder for local tasks (%(default)s)"
    )
    parser.add_argument("--limit", type=int, help="number of questions in a local task, as in llava eval (default all)")
    args = parser.parse_args(argv)
    names = [name for word in args.tasks for name in word.split(",")]
    tasks = make_tasks(names, args.data_root, args.split, args.eval_data)
    if args.lmms_eval:
        names = write_tasks(tasks, args.lmms_eval, args.output_dir, args.limit)
        print(f"lmms-eval --include_path {args.output_dir} --tasks {','.join(names)}")
        return 0
    all_ready = True
    for task in tasks:
        lines, ready = check_task(task, args.checksums)
        all_ready = all_ready and ready
        print("\n".join(lines))
    return 0 if all_ready else 1
