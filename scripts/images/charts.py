"""Draw images/scores.png (published scores) and, after the quickstart, images/loss.png (its two loss curves).

python -m scripts.images.charts scores
python -m scripts.images.charts loss
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.eval.reporting.data import PUBLISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("VQAv2", "GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MME", "MMB", "MMB-CN", "MM-Vet")
COLORS = ("#b9c3d0", "#8491a3", "#a9c7f7", "#5b8def", "#1f4fb0")
RUNS = {
    "Stage 1: projector on captions": "work_dirs/pretrain_quickstart",
    "Stage 2: language model and projector": "work_dirs/finetune_quickstart",
}


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e9e9e7", linewidth=0.8)
    axes.set_axisbelow(True)


def scores() -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    width = 0.82 / len(PUBLISHED)
    for index, row in enumerate(PUBLISHED):
        values = [row.scores[name] / (20 if name == "MME" else 1) for name in BENCHMARKS]
        at = [place - 0.41 + width * (index + 0.5) for place in range(len(BENCHMARKS))]
        label = f"{row.method.removesuffix('-1.0')} {row.tower} + {row.llm.replace('V-', 'Vicuna-')}"
        axes.bar(at, values, width * 0.9, color=COLORS[index], label=label)
    names = ["MME / 20" if name == "MME" else name for name in BENCHMARKS]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("score")
    axes.set_ylim(0, 100)
    axes.set_title("Scores published by the authors", loc="left")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def loss() -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
    for axes, (title, folder) in zip(figure.subplots(1, 2), RUNS.items()):
        log = (ROOT / folder / "log.jsonl").read_text(encoding="utf-8")
        rows = [row for row in map(json.loads, log.splitlines()) if "loss" in row]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=COLORS[3], linewidth=2)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        tidy(axes)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chart", choices=("scores", "loss"))
    parser.add_argument("--output", type=Path, help="default: images/CHART.png")
    args = parser.parse_args(argv)
    figure = scores() if args.chart == "scores" else loss()
    figure.savefig(args.output or ROOT / "images" / f"{args.chart}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
