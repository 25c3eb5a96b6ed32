"""Watched while a run goes on: faults of the data found beside it, and steps that do not end (users.md Z3-2)."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import transformers

logger = logging.getLogger(__name__)
GRACE: Final = 15.0  # seconds between a dump and the end, in which the other ranks reach their own
STATUS: Final = 124  # as of the command `timeout`
STDERR: Final = 2  # the descriptor: it needs no lock of Python


class DataWatch(transformers.TrainerCallback):
    """Stops the run, or counts what is skipped, as soon as the look through all records has found a fault."""

    def __init__(self, check: Callable[[], bool]):
        self.check = check
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = self.done or self.check()


class Watchdog(transformers.TrainerCallback):
    """Ends this process when nothing has happened for `seconds`, after writing where every thread of it stands.

    Ranks that wait for each other wait equally long, so each writes its own stacks before the first one leaves. Python
    may be held up as well, by a lock of a library: a timer of the interpreter's own then does the same a little later.
    """

    def __init__(self, seconds: float, rank: int, leave: Callable[[int], Any] = os._exit):
        self.seconds, self.rank, self.leave = seconds, rank, leave
        self.beat = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._alive()
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread is not None:
            self._thread.join()

    def _alive(self, *args: Any, **kwargs: Any) -> None:
        self.beat = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + 4 * GRACE, exit=True, file=STDERR)

    on_step_begin = on_substep_end = on_step_end = on_save = on_evaluate = on_prediction_step = on_log = _alive

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            quiet = time.monotonic() - self.beat
            if quiet < self.seconds:
                continue
            logger.error(
                "Rank %d: nothing has happened for %.0f seconds, more than --step_timeout; the stacks of its threads "
                "follow, then it ends. The checkpoints are whole: the same command goes on.",
                *(self.rank, quiet),
            )
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            if not self._over.wait(GRACE):
                self.leave(STATUS)
            return
