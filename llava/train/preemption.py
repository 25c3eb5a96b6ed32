"""Ending a run by a signal: a checkpoint after the current step on all ranks, then exit status 128 + signal.

Schedulers announce the end of a job by SIGTERM (Kubernetes, Slurm) or SIGUSR1 (Slurm with `--signal=USR1@120`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.arguments import TrainingArguments
from llava.data.dataset import start_worker
from llava.train.dist_utils import any_rank

logger = logging.getLogger(__name__)
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)
# torchrun passes SIGTERM on to ranks that the scheduler has signaled already; a later one is a second request.
REPEAT_SECONDS: Final = 2.0


class Preempted(SystemExit):
    """End of a run by a signal, after its checkpoint was saved; `code` is the exit status."""


class PreemptionHandler(TrainerCallback):
    """Saves a checkpoint at the end of the step in which any rank got a signal, then raises `Preempted` on all ranks.

    A second signal ends the process at once. Signals before the first step and after the last end it as usual.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._stopping = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Reinstall the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif now - self._since > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self.received
        if args.world_size > 1:
            received = int(any_rank(torch.tensor([received]), args.device))
        if received:
            self.received, self._stopping = received, True
            control.should_save, control.should_evaluate = True, False
            logger.info(
                "%s: saving checkpoint-%d, then exiting with status %d; rerun the same command to resume.",
                signal.Signals(received).name,
                state.global_step,
                128 + received,
            )

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self._stopping:
            raise Preempted(128 + self.received)


def start_loader_worker(worker_id: int) -> None:
    """Initialize a data loader worker that outlives a signal to all processes of a job, until its trainer has saved.

    It ignores the first SIGTERM only: the data loader ends a worker that hangs by another one.
    """
    start_worker(worker_id)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
