"""The chart of a report: per benchmark the published score with its noise band, and every run beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from llava.errors import DataError
from llava.eval.report_data import Line, Run, lines
from llava.utils import require

MOST: Final = {"mme": 2000.0}  # of a score; 100 elsewhere
COLORS: Final = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a")
GREY: Final = "#b9b8b4"


def draw(runs: Sequence[Run]) -> bytes:
    """A PNG. Needs matplotlib (extra `eval`), never a display."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [(run, {line.task: line for line in lines(run) if line.ours is not None}) for run in runs]
    tasks = list(dict.fromkeys(task for _, found in drawn for task in found))
    if not tasks:
        raise DataError("No benchmark has a score here, so there is nothing to draw.")
    figure = Figure(figsize=(8.5, 1.3 + (0.34 * len(runs) + 0.3) * len(tasks)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / (len(runs) + 1)
    for at, task in enumerate(tasks):
        found = [(index, lines_of[task]) for index, (_, lines_of) in enumerate(drawn) if task in lines_of]
        published = next((line for _, line in found if line.published is not None), None)
        if published is not None:
            _bar(axes, at - 0.4 + height / 2, height, published, GREY, published=True)
        for index, line in found:
            _bar(axes, at - 0.4 + height * (index + 1.5), height, line, COLORS[index % len(COLORS)])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("score (MME: of 2,000), in percent of the highest possible")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e9e9e7", linewidth=0.8)
    axes.set_axisbelow(True)
    _legend(axes, runs)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _bar(axes: object, y: float, height: float, line: Line, color: str, published: bool = False) -> None:
    """One bar with its number; the published one shows the band."""
    most = MOST.get(line.task, 100.0)
    value = line.published if published else line.ours
    assert value is not None
    share = 100 * value / most
    axes.barh(y, share, height * 0.9, color=color)  # type: ignore[attr-defined]
    reach = 0.0
    if published and line.band is not None:
        reach = 100 * line.band / most
        axes.errorbar(share, y, xerr=reach, color="#37352f", capsize=2.5, linewidth=1)  # type: ignore[attr-defined]
    text = f"{value:,.1f}" + ("" if line.limit is None or published else f"  ({line.limit} questions)")
    axes.text(share + reach + 1, y, text, va="center", fontsize=8, color="#37352f")  # type: ignore[attr-defined]


def _legend(axes: object, runs: Sequence[Run]) -> None:
    from matplotlib.patches import Patch

    known = [Patch(color=GREY, label="published, with its noise band")] if any(run.published for run in runs) else []
    ours = [Patch(color=COLORS[index % len(COLORS)], label=run.name) for index, run in enumerate(runs)]
    axes.legend(  # type: ignore[attr-defined]
        handles=[*known, *ours], loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9
    )
