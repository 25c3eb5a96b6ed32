"""Compare runs of `llava eval` with the published scores and with each other.

    llava report eval/MODEL [eval/OTHER ...] [--output-dir report] [--samples 6]
    llava report --diff eval/MODEL eval/OTHER

Prints the tables and writes them as report.md, report.csv, report.png and report.html; the page also shows sample
answers with their images. `--diff` lists the differences between two runs: settings, versions, scores, and changed
answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import ConfigError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.chart import draw_chart
from llava.eval.reporting.data import Run, compare, csv_text, markdown, read_run
from llava.eval.reporting.diff import diff_runs
from llava.eval.reporting.page import collect_samples, render_page
from llava.files import write_text
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of llava eval")
    add("--output-dir", type=Path, default=Path("report"), help="default: %(default)s")
    add("--published", metavar="NAME", help="published checkpoint to compare with (default: the model's name)")
    add("--samples", type=int, default=6, help="number of sample answers per benchmark (default %(default)s)")
    add("--diff", action="store_true", help="print the differences between two runs and write no files")
    return parser


def write_report(runs: Sequence[Run], folder: Path, count: int) -> list[Path]:
    """Write the report with `count` samples per task and return the paths of its files."""
    tasks = [task for task in TASKS if any(task in run.scores for run in runs)]
    chart = draw_chart(runs) if any(row.ours is not None for run in runs for row in compare(run)) else None
    samples = {task: collect_samples(runs, task, count) for task in tasks} if count else {}
    page = render_page(runs, chart, samples)
    texts = {"report.md": markdown(runs), "report.csv": csv_text(runs), "report.html": page}
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
            raise ConfigError(f"--diff compares two runs, got {len(runs)}.")
        print(diff_runs(*runs))
        return 0
    if args.samples < 0:
        raise ConfigError(f"--samples must be at least 0, got {args.samples}.")
    names = [run.name for run in runs]
    runs = [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=f"{run.name} ({run.folder})")
        for run in runs
    ]
    written = write_report(runs, args.output_dir, args.samples)
    print(markdown(runs))
    print("\n".join(map(str, written)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
