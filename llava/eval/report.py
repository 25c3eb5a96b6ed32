"""Compare runs of `llava eval` with the published scores and with each other.

    llava report eval/MODEL [eval/OTHER ...] [--output-dir report] [--samples 6]
    llava report --diff eval/MODEL eval/OTHER
    llava report eval/MODEL --format lmms-eval

Prints the tables and writes them as report.md, report.csv, report.png and report.html; the page also shows sample
answers with their images. `--diff` lists the differences between two runs: settings, versions, scores, and changed
answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from llava.errors import ConfigError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.chart import draw_chart
from llava.eval.reporting.data import Run, compare, csv_text, format_score, markdown, markdown_table, read_run
from llava.eval.reporting.export import export
from llava.eval.reporting.page import collect_samples, render_page
from llava.eval.run.answers import read_complete_lines, row_key
from llava.eval.run.files import Record
from llava.eval.run.manifest import read_manifest
from llava.files import write_text
from llava.utils import guarded

EXAMPLES: Final = 5
FORMATS: Final = ("report", "lmms-eval", "model-index")
SKIPPED: Final = ("asked", "engine", "seconds", "keys", "shards", "environment.command", "status")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of llava eval")
    add("--output-dir", type=Path, default=Path("report"), help="default: %(default)s")
    add("--published", metavar="NAME", help="published checkpoint to compare with (default: the model's name)")
    add("--samples", type=int, default=6, help="number of sample answers per benchmark (default %(default)s)")
    add("--format", choices=FORMATS, default=FORMATS[0], help="write these files (default %(default)s)")
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


def diff_runs(first: Run, second: Run) -> str:
    """The differences as Markdown."""
    parts = [f"# {first.folder} and {second.folder}"]
    for task in first.scores:
        if task in second.scores:
            parts += _diff_task(task, first, second)
    for run, other in ((first, second), (second, first)):
        only = [task for task in run.scores if task not in other.scores]
        if only:
            parts.append(f"Only in {run.folder}: {', '.join(only)}.")
    return "\n\n".join(parts)


def _diff_task(task: str, first: Run, second: Run) -> Iterator[str]:
    before, after = (run.scores[task].get("primary_metric") for run in (first, second))
    change = None if before is None or after is None else after - before
    yield f"## {task}: {format_score(before)} and {format_score(after)} ({format_score(change, signed=True)})"
    paths = [run.folder / task / "answers.jsonl" for run in (first, second)]
    left, right = (_flatten(read_manifest(path) or {}) for path in paths)
    rows = [
        [key, _shorten(left.get(key)), _shorten(right.get(key))]
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not key.startswith(SKIPPED)
    ]
    yield markdown_table(["setting", "first", "second"], rows) if rows else "Equal settings and versions."
    yield _diff_answers(*paths)


def _diff_answers(first: Path, second: Path) -> str:
    """The number of changed answers, and examples."""
    before = {row_key(row): str(row["text"]) for row in read_complete_lines(first)}
    after = {row_key(row): str(row["text"]) for row in read_complete_lines(second)}
    common = [key for key in before if key in after]
    changed = [key for key in common if before[key] != after[key]]
    text = f"{len(changed)} of {len(common)} answers to the same questions differ."
    if not changed:
        return text
    rows = [[_shorten(key[0]), _shorten(before[key]), _shorten(after[key])] for key in changed[:EXAMPLES]]
    return f"{text}\n\n" + markdown_table(["question", "first", "second"], rows)


def _flatten(content: Record, prefix: str = "") -> dict[str, object]:
    """A nested dictionary with its keys joined by periods."""
    flat: dict[str, object] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


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
    if args.format != FORMATS[0]:
        print("\n".join(str(export(run, args.format, args.output_dir)) for run in runs))
        return 0
    written = write_report(runs, args.output_dir, args.samples)
    print(markdown(runs))
    print("\n".join(map(str, written)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
