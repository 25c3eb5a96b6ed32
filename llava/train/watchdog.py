"""Callbacks that end a run early: data faults found by the background scan, steps that hang, and signals.

Schedulers announce the end of a job by SIGTERM (Kubernetes, Slurm) or SIGUSR1 (Slurm with `--signal=USR1@120`).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.arguments import TrainingArguments
from llava.data.dataset import start_worker
from llava.train.dist_utils import any_rank

logger = logging.getLogger(__name__)
GRACE: Final = 15.0  # seconds between the stack dump and the exit, so that the other ranks can dump theirs
STATUS: Final = 124  # exit status, as of the command `timeout`
STDERR: Final = 2  # the file descriptor: writing to it needs no Python lock
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)
# torchrun passes SIGTERM on to ranks that the scheduler has signaled already; a later one is a second request.
REPEAT_SECONDS: Final = 2.0


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


class Preempted(SystemExit):
    """End of a run by a signal, after its checkpoint was saved; `code` is the exit status."""


class PreemptionHandler(TrainerCallback):
    """Saves a checkpoint at the end of the step in which any rank got a signal, then raises `Preempted` on all ranks.

    With several ranks, a signal after `share` counts for the next step. A second signal ends the process at once.
    Signals before the first step and after the last end it as usual.
    """

    def __init__(self) -> None:
        self.received = 0
        self._shared: torch.Tensor | None = None
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

    def share(self, args: TrainingArguments) -> None:
        """Start the exchange of signals; call before the host waits for the device, so that nothing else waits."""
        if args.world_size > 1:
            shared = any_rank(torch.tensor([self.received]), args.device)
            self._shared = torch.empty_like(shared, device="cpu", pin_memory=shared.is_cuda)
            self._shared.copy_(shared, non_blocking=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self.received if self._shared is None else int(self._shared)
        if self._shared is not None and not received and control.should_evaluate:  # the next step may be far away
            received = int(any_rank(torch.tensor([self.received]), args.device))
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

    It ignores the first SIGTERM only: the data loader ends a worker that hangs by another one. Its thread that hands
    tensors over is silent about a trainer that ends meanwhile.
    """
    start_worker(worker_id)
    report = sys.excepthook

    def excepthook(kind: type[BaseException], *error: Any) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main or not issubclass(kind, (EOFError, ConnectionError)):
            report(kind, *error)

    sys.excepthook = excepthook
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
