"""Scheduler between asyncio requests and the engine's thread: slots, a bounded queue, cancellation.

A slot is taken when a request is admitted and released when the engine has dropped it, not when its client has
disconnected; so the slots in use are the requests that consume resources.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from llava.engine.sequence import GUIDE_FAILED, Completion, Request, RequestHandle, TokenLogprobs
from llava.engine.statistics import Statistics
from llava.serve.common.protocol import ErrorType, ServeError

logger = logging.getLogger(__name__)

_FATAL: Final = ("device-side assert", "cuda error", "acceleratorerror", "cublas_status", "illegal memory access")
_GIVE_UP_AFTER: Final = 8  # consecutive failed steps
_STOPPED: Final = "the worker was stopped"


class EngineLike(Protocol):
    """The methods of `llava.engine.Engine` that a worker calls."""

    @property
    def running(self) -> int: ...
    def submit(self, request: Request) -> RequestHandle: ...
    def step(self) -> bool: ...
    def abort(self, error: str) -> None: ...
    def statistics(self) -> Statistics: ...


class StreamEvent(NamedTuple):
    """New text and log probabilities of a request after an engine step, and its completion after the last one."""

    text: str
    completion: Completion | None
    logprobs: Sequence[TokenLogprobs] = ()
    choice: int = 0  # index of the slot


@dataclass(eq=False)
class Slot:
    """An admitted request. Read `events` on the event loop; call `close` when the client is done or disconnected.

    The slots of one request with several choices share `events`.
    """

    scheduler: Scheduler
    events: asyncio.Queue[StreamEvent] = field(default_factory=asyncio.Queue)
    index: int = 0
    handle: RequestHandle | None = None
    submitted: bool = False
    closed: bool = False
    released: bool = False

    async def submit(self, request: Request) -> RequestHandle:
        """Submit the request to the engine; raises the exceptions of `Engine.submit`."""
        (handle,) = await self.scheduler.submit([self], [request])
        return handle

    def close(self) -> None:
        """Cancel the request; idempotent. The slot is released after the engine's next step."""
        self.closed = True
        if self.handle is not None:
            self.handle.cancel()
        elif not self.submitted:
            self.release()

    def release(self) -> None:
        """Release the slot; idempotent."""
        if not self.released:
            self.released = True
            self.scheduler.in_use -= 1


class _Submission(NamedTuple):
    slot: Slot
    request: Request
    accepted: asyncio.Future[RequestHandle]


class Scheduler:
    """Owner of the engine's thread. Only `_run` and its callees run in that thread, all else on the event loop.

    `limit` requests share the engine's batch and `queue_limit` more may wait; further ones are refused.
    """

    def __init__(self, engine: EngineLike, limit: int, queue_limit: int) -> None:
        self.engine = engine
        self.limit = limit
        self.capacity = limit + queue_limit
        self.in_use = 0
        self.failure = ""  # reason why the engine was given up
        self.on_failure: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._inbox: list[_Submission] = []
        self._active: list[tuple[Slot, RequestHandle]] = []
        self._condition = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return self.engine.running

    @property
    def waiting(self) -> int:
        return max(0, self.in_use - self.engine.running)

    def admit(self) -> Slot:
        """Take a slot; `ServeError` (503) when all are in use."""
        return self.admit_choices(1)[0]

    def admit_choices(self, count: int) -> list[Slot]:
        """Take a slot for each choice of a request. `ServeError` if too few are free (503) or exist (400)."""
        if self.failure:
            raise ServeError(ErrorType.NOT_READY, "The model has failed and is being restarted.", retry_after=10)
        if count > max(1, self.capacity):
            text = f"The request has {count} choices, and this worker takes {self.capacity} at a time; lower n."
            raise ServeError(ErrorType.BAD_REQUEST, text, param="n")
        if self.in_use + count > self.capacity:
            raise ServeError(
                ErrorType.OVERLOADED,
                f"{self.limit} requests are running and {self.capacity - self.limit} are waiting; try again shortly.",
                retry_after=2,
            )
        self.in_use += count
        events: asyncio.Queue[StreamEvent] = asyncio.Queue()
        return [Slot(self, events, index) for index in range(count)]

    async def submit(self, slots: Sequence[Slot], requests: Sequence[Request]) -> list[RequestHandle]:
        """Submit the requests of admitted slots before the engine's next step, so that they share a prefill."""
        submissions = []
        for slot, request in zip(slots, requests, strict=True):
            slot.submitted = True
            submissions.append(_Submission(slot, request, self._loop.create_future()))
        with self._condition:
            self._inbox += submissions
            self._condition.notify()
        return await asyncio.gather(*(submission.accepted for submission in submissions))

    async def stop(self) -> None:
        """Abort the running requests and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join, 30)
        await asyncio.sleep(0)  # deliver the last events

    # --- engine thread ---

    def _run(self) -> None:
        while True:
            with self._condition:
                submissions, self._inbox = self._inbox, []
                stopping = self._stopping
            for submission in submissions:
                self._submit(submission)
            if stopping:
                self.engine.abort(_STOPPED)
                self._deliver()
                return
            busy = True
            try:
                busy = self.engine.step()
            except Exception as error:  # any exception of a model fails the requests of this step only
                self._recover(error)
            self._deliver()
            with self._condition:
                if not (busy or self._inbox or self._stopping):
                    self._condition.wait()

    def _submit(self, submission: _Submission) -> None:
        if submission.slot.closed:
            self._call(self._resolve, submission, ServeError(ErrorType.BAD_REQUEST, "The client has disconnected."))
            return
        try:
            handle = self.engine.submit(submission.request)
        except Exception as error:  # reported to the submitter
            self._call(self._resolve, submission, error)
            return
        self._active.append((submission.slot, handle))
        self._call(self._resolve, submission, handle)

    def _recover(self, error: Exception) -> None:
        """Fail the requests of a failed step; give the engine up after a fatal error or too many failures."""
        logger.exception("A step of the engine failed")
        text = f"{type(error).__name__}: {error}"
        if not any(_is_failed(handle) for _, handle in self._active):
            self.engine.abort(text)
        self._failures += 1
        if any(mark in text.lower() for mark in _FATAL) or self._failures >= _GIVE_UP_AFTER:
            self.engine.abort(text)
            self.failure = "the engine failed"
            self._call(self.on_failure)

    def _deliver(self) -> None:
        events = []
        for slot, handle in list(self._active):
            completion = handle.completion  # read first: once it is set, the text is complete
            text, logprobs = handle.take(), handle.take_logprobs()
            if text or logprobs or completion is not None:
                events.append((slot, StreamEvent(text, completion, logprobs, slot.index)))
            if completion is not None:
                self._active.remove((slot, handle))
                if completion.finish_reason != "error":
                    self._failures = 0
        if events:
            self._call(_deliver_events, events)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Call a function on the event loop."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("The event loop has ended; an event of the engine is dropped.")

    # --- event loop ---

    @staticmethod
    def _resolve(submission: _Submission, outcome: RequestHandle | Exception) -> None:
        slot, _, accepted = submission
        if isinstance(outcome, Exception):
            slot.release()
            if not accepted.done():
                accepted.set_exception(outcome)
            return
        slot.handle = outcome
        if slot.closed:
            outcome.cancel()
        if not accepted.done():
            accepted.set_result(outcome)


def _deliver_events(events: list[tuple[Slot, StreamEvent]]) -> None:
    for slot, event in events:
        if event.completion is not None:
            slot.release()
        slot.events.put_nowait(event)


def _is_failed(handle: RequestHandle) -> bool:
    return handle.completion is not None and handle.completion.finish_reason == "error"


def completion_error(completion: Completion) -> ServeError:
    """The error of a failed completion, without the text of the exception, which may contain internals."""
    if (completion.error or "").startswith(GUIDE_FAILED):
        return ServeError(ErrorType.BAD_REQUEST, completion.error or "")
    text = (completion.error or "").lower()
    if text == _STOPPED:
        message = "The worker was stopped before the answer was complete; send the request again."
        return ServeError(ErrorType.WORKER_UNAVAILABLE, message)
    if "outofmemory" in text or "out of memory" in text:
        message = "The model ran out of memory on this request; send fewer or smaller images, or a shorter text."
        return ServeError(ErrorType.OUT_OF_MEMORY, message)
    return ServeError(ErrorType.INTERNAL, "The model failed on this request; see the worker's log.")
