"""Progress of a run: console line and progress bar, `log.jsonl`, `loss.png`, TensorBoard and wandb."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import netrc
import os
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence, Sized
from pathlib import Path
from typing import Final

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from llava.files import atomic_write, write_text
from llava.train.throughput import format_duration
from llava.utils import require

logger = logging.getLogger(__name__)
Logs = Mapping[str, object]
LOG_FILE: Final = "log.jsonl"
EVENTS: Final = frozenset(name for name in dir(TrainerCallback) if name.startswith("on_"))
WINDOW: Final = 0.05  # of the loss curve, averaged by its smoothed line
COLUMNS: Final = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "eval_loss": "validation loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gib": "{:.1f} GiB",
    "unsupervised_groups": "{} loss groups without labels",
    "time_left": "{} left",
}


# --- Console ----------------------------------------------------------------------------------------------------------


def format_line(logs: Logs, step: int, max_steps: int) -> str:
    """The console line of one log entry: step, epoch, loss, learning rate, gradient norm, speed, memory, time left."""
    if "train_runtime" in logs:
        duration = format_duration(float(str(logs["train_runtime"])))
        return f"training finished: {step} steps in {duration} | mean loss {logs['train_loss']:.4f}"
    columns = [text.format(logs[key]) for key, text in COLUMNS.items() if key in logs]
    if not {"loss", "eval_loss"} & set(logs):  # logged by a callback
        columns += [f"{key} {value}" for key, value in logs.items() if key not in COLUMNS]
    return " | ".join([f"step {step}/{max_steps}", *columns])


class Console(TrainerCallback):
    """Prints one line per log step to stdout and draws a progress bar if stderr is a terminal (global rank 0 only)."""

    def __init__(self) -> None:
        self._training: tqdm[None] | None = None
        self._validation: tqdm[None] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._draws(args, state):
            self._training = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )

    @staticmethod
    def _draws(args: TrainingArguments, state: TrainerState) -> bool:
        return bool(state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty())

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._training is not None:
            self._training.update(state.global_step - self._training.n)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: object, eval_dataloader: Sized, **kwargs: object
    ) -> None:
        if self._validation is None and self._draws(args, state):
            self._validation = tqdm(total=len(eval_dataloader), leave=False, desc="validation", dynamic_ncols=True)
        if self._validation is not None:
            self._validation.update()

    def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    on_predict = on_evaluate

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **kwargs: object) -> None:
        if state.is_world_process_zero:
            tqdm.write(format_line(logs, state.global_step, state.max_steps), file=sys.stdout)
            sys.stdout.flush()

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bars, so that later output starts on a new line."""
        for bar in (self._validation, self._training):
            if bar is not None:
                bar.close()
        self._validation = self._training = None


# --- Files ------------------------------------------------------------------------------------------------------------


def truncate_log(path: Path, step: int) -> None:
    """Drop the entries of `log.jsonl` after `step`, summaries of finished runs, and a line cut short by a crash."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, step)]
    if kept != lines:
        write_text(path, "".join(kept))


def _is_before(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return line.endswith("\n") and entry["step"] <= step and "train_runtime" not in entry
    except (ValueError, KeyError, TypeError):
        return False


class LogFiles(TrainerCallback):
    """Appends every log entry to `log.jsonl` and draws `loss.png` at each save and at the end (global rank 0 only).

    A run that resumes at step N first drops the entries after N, which it logs again.
    """

    def __init__(self, output_dir: Path, *, plot: bool):
        self.output_dir, self.plot = output_dir, plot
        if plot and importlib.util.find_spec("matplotlib") is None:
            logger.warning("matplotlib is not installed, so loss.png is not drawn: pip install 'llava[train]'")
            self.plot = False

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            truncate_log(self.output_dir / LOG_FILE, state.global_step)

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **kwargs: object) -> None:
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def on_save(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.plot and state.is_world_process_zero:
            title = f"{self.output_dir.name}, step {state.global_step} of {state.max_steps}"
            plot_loss(state.log_history, self.output_dir / "loss.png", title)

    on_train_end = on_save


def smoothing(count: int) -> float:
    """Decay of the moving average over a curve of `count` points."""
    return min(0.99, max(0.5, 1 - 1 / (WINDOW * count)))


def smoothed(values: Sequence[float], decay: float) -> list[float]:
    """Exponential moving average with bias correction, as in Adam (arXiv:1412.6980)."""
    average, out = 0.0, []
    for count, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        out.append(average / (1 - decay**count))
    return out


def plot_loss(history: Sequence[Mapping[str, float]], path: Path, title: str) -> bool:
    """Plot training and validation loss over steps; False if the history holds fewer than two points.

    `history` is the trainer's `log_history`. Needs matplotlib, but no display.
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
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each log step")
    decay = smoothing(len(losses))
    axes.plot(steps, smoothed(losses, decay), color="tab:blue", linewidth=2, label=f"moving average ({decay:.2g})")
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


# --- TensorBoard and wandb --------------------------------------------------------------------------------------------


def default_wandb_offline(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set wandb to offline mode if it has no API key and no mode, instead of letting it prompt for a login."""
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_MODE")):
        return
    try:
        known = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        environment["WANDB_MODE"] = "offline"
        logger.warning("wandb has no API key: logging offline; upload later with wandb sync, or set WANDB_API_KEY.")


class IsolatedReporter(TrainerCallback):
    """Forwards every event to a reporter until one fails; training then continues without the reporter."""

    def __init__(self, reporter: TrainerCallback, name: str):
        self.reporter: TrainerCallback | None = reporter
        self.name = name

    def __getattribute__(self, name: str) -> object:
        own = super().__getattribute__
        return functools.partial(own("_forward"), name) if name in EVENTS else own(name)

    def _forward(self, event: str, *args: object, **kwargs: object) -> None:
        if self.reporter is None:
            return
        try:
            getattr(self.reporter, event)(*args, **kwargs)
        except Exception as error:  # no failure of a reporter is worth a run
            logger.warning("%s failed (%s: %s); training continues without it.", self.name, type(error).__name__, error)
            self.reporter = None


def isolate_reporters(trainer: Trainer, names: Sequence[str]) -> None:
    """Wrap each reporter of the trainer in an `IsolatedReporter`."""
    if "wandb" in names:
        default_wandb_offline()
    for kind in get_reporting_integration_callbacks(list(names)) if list(names) != ["none"] else []:
        reporter = trainer.pop_callback(kind)
        if reporter is not None:
            trainer.add_callback(IsolatedReporter(reporter, kind.__name__.removesuffix("Callback")))
