"""The loss curve of a run as a picture, drawn from the trainer's log: `loss.png` in the output directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.utils import require

SPAN = 0.05  # of the curve, which an average looks back over


def smoothing(count: int) -> float:
    """The weight of the past in the average over a curve of `count` points."""
    return min(0.99, max(0.5, 1 - 1 / (SPAN * count)))


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the bias towards the first value (as Adam corrects its own)."""
    average, out = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draw loss over step with its smoothed course; False if the log holds fewer than two points.

    `history` is the trainer's `log_history`. Needs matplotlib (extra `train`), never a display.
    """
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if len(points) < 2:
        return False
    require("matplotlib", "train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, losses = zip(*points)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each log line")
    weight = smoothing(len(losses))
    axes.plot(steps, smoothed(losses, weight), color="tab:blue", linewidth=2, label=f"moving average ({weight:.2g})")
    validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if validation:
        axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per supervised token)")
    axes.set_title(title)
    axes.set_xlim(steps[0], steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    part = path.with_suffix(".part.png")
    FigureCanvasAgg(figure).print_png(str(part))
    part.replace(path)
    return True
