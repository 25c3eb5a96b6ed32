"""The chart of a report: per benchmark a bar for every run, and on it the published score with its noise band."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

from llava.errors import DataError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.data import Line, Run, lines
from llava.utils import require

MOST: Final = {"mme": 2000.0}  # of a score; 100 elsewhere
COLORS: Final = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#8a6d3b", "#2fa3a0", "#6b7680")
LONGEST: Final = 64  # characters of a name in the legend
INK: Final = "#37352f"


def draw(runs: Sequence[Run]) -> bytes:
    """A PNG. Needs matplotlib (extra `eval`), never a display."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [{line.task: line for line in lines(run) if line.ours is not None} for run in runs]
    tasks = list(dict.fromkeys(task for found in drawn for task in found))
    if not tasks:
        raise DataError("No benchmark has a score here, so there is nothing to draw.")
    inches = 1.0 + 0.18 * len(runs) + (0.26 * len(runs) + 0.2) * len(tasks)
    figure = Figure(figsize=(8.5, inches), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    height = 0.78 / len(runs)
    for at, task in enumerate(tasks):
        for index, found in enumerate(drawn):
            if task in found:
                _bar(axes, at - 0.39 + height * (index + 0.5), height, found[task], COLORS[index % len(COLORS)])
    axes.set_yticks(range(len(tasks)), [TASKS[task].column or task for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("percent of the highest possible score (100; MME 2,000)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e9e9e7", linewidth=0.8)
    axes.set_axisbelow(True)
    _legend(axes, runs)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _bar(axes: Any, y: float, height: float, line: Line, color: str) -> None:
    """A score with its number, and over it the published one with its band."""
    most = MOST.get(line.task, 100.0)
    assert line.ours is not None
    share = end = 100 * line.ours / most
    axes.barh(y, share, height * 0.88, color=color)
    text = f"{line.ours:,.1f}"
    if line.published is not None and line.band is not None:
        reach, place = 100 * line.band / most, 100 * line.published / most
        axes.errorbar(place, y, xerr=reach, color=INK, capsize=3, linewidth=1.2, marker="|", markersize=9)
        end, text = max(share, place + reach), f"{text}  (published {line.published:,.1f})"
    elif line.limit is not None:
        text = f"{text}  ({line.limit:,} questions)"
    axes.text(end + 1.6, y, text, va="center", fontsize=8, color=INK)


def _legend(axes: Any, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [_short(run.name) for run in runs]
    handles: list[Any] = [Patch(color=COLORS[at % len(COLORS)], label=name) for at, name in enumerate(names)]
    if any(run.published for run in runs):
        handles.append(Line2D([], [], color=INK, marker="|", markersize=9, label="published, with its noise band"))
    columns = 2 if max(map(len, names)) <= LONGEST // 2 else 1
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9)


def _short(name: str) -> str:
    """A name without its middle, where it is too long for the chart."""
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"
