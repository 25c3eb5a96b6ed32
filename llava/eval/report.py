"""Compare runs of `llava eval` with the published scores and with each other.

    llava report eval/MODEL [eval/OTHER ...] [--output-dir report] [--samples 6]
    llava report --diff eval/MODEL eval/OTHER
    llava report eval/MODEL --format lmms-eval

Prints the tables and writes them as report.md, report.csv, report.png and report.html; the page also shows the error
analysis and sample answers with their images. `--diff` attributes the gap between two runs to the scorer,
missing and unread answers, prompts, pixels, decoding and weights; diff.html shows the questions gained and lost.
`--ask --model-path CHECKPOINT` separates joint causes by running the model again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from llava.errors import ConfigError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.chart import draw_chart
from llava.eval.reporting.data import Run, compare, csv_text, markdown, read_run
from llava.eval.reporting.diff import Ask, Explanation, explain
from llava.eval.reporting.diff_page import diff_markdown, diff_page
from llava.eval.reporting.errors import analyse
from llava.eval.reporting.export import export
from llava.eval.reporting.page import TaskErrors, collect_samples, render_page
from llava.eval.reporting.sides import load_side
from llava.eval.uncertainty import holm
from llava.files import write_text
from llava.utils import guarded

FORMATS: Final = ("report", "lmms-eval", "model-index")


def build_parser(*, ask: bool = False) -> argparse.ArgumentParser:
    """The flags; with `ask`, also those of a model."""
    parser = argparse.ArgumentParser(
        prog="llava report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of llava eval")
    add("--output-dir", type=Path, default=Path("report"), help="default: %(default)s")
    add("--published", metavar="NAME", help="published checkpoint to compare with (default: the model's name)")
    add("--samples", type=int, default=6, help="number of sample answers per benchmark (default %(default)s)")
    add("--format", choices=FORMATS, default=FORMATS[0], help="write these files (default %(default)s)")
    add("--diff", action="store_true", help="explain the gap between two runs; writes diff.html")
    add("--ask", action="store_true", help="with --diff: run a model again to separate joint causes (--ask --help)")
    if ask:
        from llava.eval.options import EvalArgs

        EvalArgs.add_cli_args(parser)
    return parser


def write_report(runs: Sequence[Run], folder: Path, count: int) -> list[Path]:
    """Write the report with `count` samples per task and return the paths of its files."""
    tasks = [task for task in TASKS if any(task in run.scores for run in runs)]
    chart = draw_chart(runs) if any(row.ours is not None for run in runs for row in compare(run)) else None
    samples = {task: collect_samples(runs, task, count) for task in tasks} if count else {}
    page = render_page(runs, chart, samples, list(error_analyses(runs)))
    texts = {"report.md": markdown(runs), "report.csv": csv_text(runs), "report.html": page}
    for name, text in texts.items():
        write_text(folder / name, text)
    if chart is not None:
        (folder / "report.png").write_bytes(chart)
    return [folder / name for name in (*texts, *(["report.png"] if chart is not None else []))]


def error_analyses(runs: Sequence[Run]) -> Iterator[TaskErrors]:
    """The error analysis of each task, or the reason why it is not available."""
    for task in TASKS:
        sides = {run.name: load_side(run.folder, run.scores[task]) for run in runs if task in run.scores}
        found = {name: analyse(side.answers) for name, side in sides.items() if side.answers}
        yield task, found, {name: side.unscored for name, side in sides.items() if not side.answers}


def explain_runs(first: Run, second: Run, ask: Ask | None = None) -> list[Explanation]:
    """The gap of each task that both runs answered on the same split; p values are adjusted for their number."""
    found = []
    for task in TASKS:
        scores = [run.scores.get(task) for run in (first, second)]
        known = scores[0] or scores[1]
        if known is None or not all((run.folder / task / "answers.jsonl").is_file() for run in (first, second)):
            continue
        withheld = {**known, "primary_metric": None, "scorer": None}  # answers are missing in this run
        sides = [load_side(run.folder, score or withheld) for run, score in zip((first, second), scores)]
        if sides[0].task.split != sides[1].task.split:
            raise ConfigError(f"{task}: the splits {sides[0].task.split} and {sides[1].task.split} are not comparable.")
        found.append(explain(sides[0], sides[1], ask))
    adjusted = holm({each.name: each.comparison.p_value for each in found if each.comparison})
    return [
        dataclasses.replace(each, comparison=dataclasses.replace(each.comparison, p_adjusted=adjusted[each.name]))
        if each.comparison else each
        for each in found
    ]  # fmt: skip


def write_diff(args: argparse.Namespace, runs: Sequence[Run]) -> list[Path]:
    """Print the explained gap and write its page."""
    if len(runs) != 2:
        raise ConfigError(f"--diff compares two runs, got {len(runs)}.")
    ask = None
    if args.ask:
        from llava.eval.options import EvalArgs  # loads torch
        from llava.eval.reporting.ask import ask_hybrids

        ask = partial(ask_hybrids, EvalArgs.from_cli_args(args), args.output_dir / "asked")
    first, second = runs
    explanations = explain_runs(first, second, ask)
    print(diff_markdown(first, second, explanations))
    path = args.output_dir / "diff.html"
    write_text(path, diff_page(first, second, explanations, args.samples))
    return [path]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(ask="--ask" in words).parse_args(words)
    runs = [read_run(folder, args.published) for folder in args.runs]
    if args.samples < 0:
        raise ConfigError(f"--samples must be at least 0, got {args.samples}.")
    if args.ask and not args.diff:
        raise ConfigError("--ask explains the gap between two runs; add --diff.")
    if args.diff:
        print("\n".join(map(str, write_diff(args, runs))), file=sys.stderr)
        return 0
    names = [run.name for run in runs]
    runs = [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=f"{run.name} ({run.folder})")
        for run in runs
    ]
    if args.format != FORMATS[0]:
        print("\n".join(str(export(run, args.format, args.output_dir)) for run in runs))
        return 0
    written = write_report(runs, args.output_dir, args.samples)
    print(markdown(runs))
    print("\n".join(map(str, written)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
