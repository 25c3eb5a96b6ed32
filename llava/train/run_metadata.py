"""What a run leaves beside its weights: `run.json` (how it was made), `log.jsonl` (every log line) and `loss.png`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import transformers

from llava.files import atomic_write, write_text
from llava.provenance import git_commit, installed_versions
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
    with atomic_write(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))
    return True


# --- What a run leaves beside its weights -----------------------------------------------------------------------------


logger = logging.getLogger(__name__)
DECISIVE = ("global_batch", "samples", "data_bytes", "world_size")
PLACES = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "local_rank")  # of a run, not the run


def plain(arguments: Any) -> dict[str, Any]:
    """A dataclass of arguments as JSON values; secrets of transformers' arguments are masked by its own `to_dict`."""
    values = arguments.to_dict() if hasattr(arguments, "to_dict") else dict(vars(arguments))
    out = {}
    for field in dataclasses.fields(arguments):
        value = values.get(field.name)
        value = value.value if isinstance(value, Enum) else value
        out[field.name] = value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
    return out


def changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each flag whose value is another one, with both; `before` and `now` hold groups of arguments."""
    return [
        f"--{name} {value} (was {before[group][name]})"
        for group, values in now.items()
        for name, value in values.items()
        if name not in PLACES and before.get(group, {}).get(name, value) != value
    ]


class RunMetadata:
    """`run.json`: rewritten whole at the start and at the end of a run, by one process."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.facts = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git_commit(),
            "versions": installed_versions(),
            **facts,
        }

    def compare(self) -> None:
        """Say what differs from the run that is gone on with, which left the file."""
        if not self.facts.get("resumed_from") or not self.path.is_file():
            return
        before, now = json.loads(self.path.read_text(encoding="utf-8")), self.facts
        for key in DECISIVE:
            if before.get(key) != now.get(key):
                logger.warning(
                    "Resuming with %s %s, but it was %s: the rest of the run is not what it would have been.",
                    *(key, now.get(key), before.get(key)),
                )
        flags = changed_flags(before.get("arguments", {}), now["arguments"])
        if flags:
            logger.warning(
                "Resuming with other flags: %s; learning rate, weight decay and betas stay the checkpoint's.",
                ", ".join(flags),
            )

    def write(self, **more: Any) -> None:
        self.facts.update(more)
        write_text(self.path, json.dumps(self.facts, indent=2, sort_keys=True) + "\n")


class RunFiles(transformers.TrainerCallback):
    """Append every log line to `log.jsonl`, and draw `loss.png` at each save and at the end."""

    def __init__(self, output_dir: Path, *, plot: bool):
        self.output_dir = output_dir
        self.plot = plot
        if plot and importlib.util.find_spec("matplotlib") is None:
            logger.warning("matplotlib is not installed, so no loss.png is drawn: pip install 'llava[train]'")
            self.plot = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, "time": round(time.time(), 3), **(logs or {})}
            with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.plot and state.is_world_process_zero:
            title = f"{self.output_dir.name}, step {state.global_step} of {state.max_steps}"
            plot_loss(state.log_history, self.output_dir / "loss.png", title)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_save(args, state, control)
