"""Dashboards beside `log.jsonl`: TensorBoard when installed, wandb when asked for; losing one loses no run (LOG-1).

Nothing here ever asks: wandb without a key keeps the run on disk, for `wandb sync`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import netrc
import os
from collections.abc import Sequence
from typing import Any, Final

import transformers
from transformers.integrations import get_reporting_integration_callbacks

logger = logging.getLogger(__name__)
REPORTERS: Final = {"tensorboard": "tensorboard", "wandb": "wandb"}
EVENTS: Final = frozenset(name for name in dir(transformers.TrainerCallback) if name.startswith("on_"))


def usable(names: Sequence[str] | str | None) -> list[str]:
    """The reporters of `--report_to` whose package is here; "auto" takes TensorBoard where it is installed."""
    wanted = [names] if isinstance(names, str) else list(names or ["none"])
    if "auto" in wanted:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else ["none"]
    found = []
    for name in list(REPORTERS) if wanted == ["all"] else [name for name in wanted if name != "none"]:
        package = REPORTERS.get(name, name)
        if importlib.util.find_spec(package) is None:
            logger.warning(
                "--report_to %s: the package %s is not installed; log.jsonl is written anyway.", name, package
            )
        else:
            found.append(name)
    return found or ["none"]


def quiet_wandb(environment: Any = os.environ) -> None:
    """Without a key or a mode of the user's, wandb writes to disk instead of asking who is there."""
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_MODE")):
        return
    try:
        known = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        environment["WANDB_MODE"] = "offline"
        logger.warning(
            "wandb has no key, so the run is kept on disk: wandb sync sends it later (or set WANDB_API_KEY)."
        )


class Guarded(transformers.TrainerCallback):
    """Hands every event to a dashboard until it fails once; then the run goes on without it."""

    def __init__(self, reporter: transformers.TrainerCallback, name: str):
        self.reporter: transformers.TrainerCallback | None = reporter
        self.name = name

    def __getattribute__(self, name: str) -> Any:
        """Every event of a callback is handed on."""
        own = super().__getattribute__
        return functools.partial(own("hand_on"), name) if name in EVENTS else own(name)

    def hand_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.reporter is None:
            return
        try:
            getattr(self.reporter, event)(*args, **kwargs)
        except Exception as error:  # whatever a dashboard raises, it is not worth the run
            logger.warning("%s failed (%s: %s); the run goes on without it.", self.name, type(error).__name__, error)
            self.reporter = None


def guard(trainer: transformers.Trainer, names: Sequence[str]) -> None:
    """Put each of the trainer's dashboards behind a `Guarded`."""
    if "wandb" in names:
        quiet_wandb()
    for kind in get_reporting_integration_callbacks(list(names)) if list(names) != ["none"] else []:
        reporter = trainer.pop_callback(kind)
        if reporter is not None:
            trainer.add_callback(Guarded(reporter, kind.__name__.removesuffix("Callback")))
