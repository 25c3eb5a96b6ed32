"""Compare runs of `llava eval` with the published scores, and with each other.

    llava report eval/MODEL [eval/OTHER ...] [--output-dir report] [--samples 6]
    llava report --diff eval/MODEL eval/OTHER

Prints the tables and writes them as report.md, report.csv, report.png and report.html, the last with sample answers and
their pictures. `--diff` says what differs between two runs: settings, versions, scores, and the answers that changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import ConfigError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.chart import draw
from llava.eval.reporting.data import Run, csv_text, lines, markdown, read_run
from llava.eval.reporting.diff import difference
from llava.eval.reporting.page import page
from llava.eval.reporting.samples import samples
from llava.files import write_text
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that llava eval wrote")
    parser.add_argument("--output-dir", type=Path, default=Path("report"), help="default: %(default)s")
    parser.add_argument("--published", metavar="NAME", help="checkpoint to compare with (default: the model's name)")
    parser.add_argument("--samples", type=int, default=6, help="answers shown of each benchmark (default %(default)s)")
    parser.add_argument("--diff", action="store_true", help="say what differs between two runs, and write nothing")
    return parser


def write(runs: Sequence[Run], folder: Path, count: int) -> list[Path]:
    """Write all forms of the report; the files."""
    tasks = [task for task in TASKS if any(task in run.scores for run in runs)]
    chart = draw(runs) if any(line.ours is not None for run in runs for line in lines(run)) else None
    shown = {task: samples(runs, task, count) for task in tasks} if count else {}
    texts = {"report.md": markdown(runs), "report.csv": csv_text(runs), "report.html": page(runs, chart, shown)}
    for name, text in texts.items():
        write_text(folder / name, text)
    if chart is not None:
        (folder / "report.png").write_bytes(chart)
    return [folder / name for name in (*texts, *(["report.png"] if chart is not None else []))]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    runs = [read_run(folder, args.published) for folder in args.runs]
    if args.diff:
        if len(runs) != 2:
            raise ConfigError(f"--diff compares two runs, and {len(runs)} are given.")
        print(difference(*runs))
        return 0
    if args.samples < 0:
        raise ConfigError(f"--samples is {args.samples}; it must be at least 0.")
    runs = _distinct(runs)
    written = write(runs, args.output_dir, args.samples)
    print(markdown(runs))
    print("\n".join(map(str, written)), file=sys.stderr)
    return 0


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of one model are told apart by their folders."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(f"{run.name} ({run.folder})", run.folder, run.scores, run.published)
        for run in runs
    ]


if __name__ == "__main__":
    sys.exit(main())
