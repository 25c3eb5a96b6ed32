"""Callbacks that end a run early: data faults found by the background scan, and steps that hang."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)
GRACE: Final = 15.0  # seconds between the stack dump and the exit, so that the other ranks can dump theirs
STATUS: Final = 124  # exit status, as of the command `timeout`
STDERR: Final = 2  # the file descriptor: writing to it needs no Python lock


class DataCheck(TrainerCallback):
    """Polls the background scan of the data set after every step; a fault it found raises, or is counted as skipped."""

    def __init__(self, check: Callable[[], bool]):
        self.check = check
        self.done = False

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.done = self.done or self.check()


class Watchdog(TrainerCallback):
    """Ends this process after `seconds` without an event of the trainer, and dumps the stacks of all its threads.

    Ranks that wait for each other wait equally long, so each dumps its own stacks before the first one exits. If a
    library lock blocks Python itself, `faulthandler`'s timer does the same a little later.
    """

    def __init__(self, seconds: float, rank: int, leave: Callable[[int], object] = os._exit):
        self.seconds, self.rank, self.leave = seconds, rank, leave
        self.last_event = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self._reset()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread is not None:
            self._thread.join()

    def _reset(self, *args: object, **kwargs: object) -> None:
        self.last_event = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + 4 * GRACE, exit=True, file=STDERR)

    on_step_begin = on_substep_end = on_step_end = on_save = on_evaluate = on_prediction_step = on_log = _reset

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 4)):
            idle = time.monotonic() - self.last_event
            if idle < self.seconds:
                continue
            logger.error(
                "Rank %d: no training event for %.0f seconds, longer than --step_timeout. Dumping the stacks of all "
                "threads and exiting; saved checkpoints are complete, rerun the same command to resume.",
                self.rank,
                idle,
            )
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            if not self._stopped.wait(GRACE):
                self.leave(STATUS)
            return
