"""Bar chart of a report: a bar per benchmark and run with its confidence interval, and the published score's band."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from llava.errors import DataError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.data import Comparison, Run, compare
from llava.utils import require

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MAX_SCORES: Final = {"mme": 2000.0}  # 100 for the other tasks
COLORS: Final = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#8a6d3b", "#2fa3a0", "#6b7680")
MAX_NAME: Final = 64  # characters of a name in the legend
INK: Final = "#37352f"


def draw_chart(runs: Sequence[Run]) -> bytes:
    """Draw the chart as a PNG; needs matplotlib (extra `eval`), but no display."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [{row.task: row for row in compare(run) if row.ours is not None} for run in runs]
    tasks = list(dict.fromkeys(task for rows in scored for task in rows))
    if not tasks:
        raise DataError("No benchmark has a score to draw.")
    inches = 1.0 + 0.18 * len(runs) + (0.26 * len(runs) + 0.2) * len(tasks)
    figure = Figure(figsize=(8.5, inches), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    height = 0.78 / len(runs)
    for at, task in enumerate(tasks):
        for index, rows in enumerate(scored):
            if task in rows:
                _bar(axes, at - 0.39 + height * (index + 0.5), height, rows[task], COLORS[index % len(COLORS)])
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


def _bar(axes: Axes, y: float, height: float, row: Comparison, color: str) -> None:
    """A bar with its score and confidence interval, and the published score with its noise band."""
    scale = 100 / MAX_SCORES.get(row.task, 100.0)
    assert row.ours is not None
    width = end = row.ours * scale
    axes.barh(y, width, height * 0.88, color=color)
    text = f"{row.ours:,.1f}"
    if row.interval:
        low, high = (row.interval[key] * scale for key in ("low", "high"))
        axes.plot([low, high], [y - height * 0.27] * 2, color=INK, linewidth=2.4, alpha=0.55, solid_capstyle="butt")
        end = max(end, high)
    if row.published is not None and row.band is not None:
        band, center = row.band * scale, row.published * scale
        axes.errorbar(center, y, xerr=band, color=INK, capsize=3, linewidth=1.2, marker="|", markersize=9)
        end, text = max(end, center + band), f"{text}  (published {row.published:,.1f})"
    elif row.limit is not None:
        text = f"{text}  ({row.limit:,} questions)"
    axes.text(end + 1.6, y, text, va="center", fontsize=8, color=INK)


def _legend(axes: Axes, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [_shorten(run.name) for run in runs]
    handles: list[Artist] = [Patch(color=COLORS[at % len(COLORS)], label=name) for at, name in enumerate(names)]
    if any(score.get("primary_interval") for run in runs for score in run.scores.values()):
        handles.append(Line2D([], [], color=INK, linewidth=2.4, alpha=0.55, label="95 % confidence interval"))
    if any(run.published for run in runs):
        handles.append(Line2D([], [], color=INK, marker="|", markersize=9, label="published, with its noise band"))
    columns = 2 if max(map(len, names)) <= MAX_NAME // 2 else 1
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9)


def _shorten(name: str) -> str:
    """Replace the middle of a long name by an ellipsis."""
    half = (MAX_NAME - 1) // 2
    return name if len(name) <= MAX_NAME else f"{name[:half]}…{name[-half:]}"
