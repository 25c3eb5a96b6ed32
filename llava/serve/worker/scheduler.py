"""The bridge from many asyncio clients to the one thread that drives the engine: slots, a bounded queue, cancellation.

A slot is taken when a request is admitted and given back when the engine has let go of it, not when its client has
gone: so the number of slots in use is the number of requests that cost something (spec/serve.md §12, W5–W9, W21).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from llava.engine.sequence import Completion, Request, RequestHandle
from llava.serve.common.protocol import ErrorType, ServeError

logger = logging.getLogger(__name__)

_FATAL: Final = ("device-side assert", "cuda error", "acceleratorerror", "cublas_status", "illegal memory access")
_GIVE_UP_AFTER: Final = 8  # failed steps with no answer in between


class EngineLike(Protocol):
    """The part of `llava.engine.Engine` that is used here."""

    @property
    def running(self) -> int: ...
    def submit(self, request: Request) -> RequestHandle: ...
    def step(self) -> bool: ...
    def abort(self, error: str) -> None: ...


class StreamEvent(NamedTuple):
    """What a step brought for one request; `completion` on its last."""

    text: str
    completion: Completion | None


@dataclass(eq=False)
class Ticket:
    """An admitted request. Read `news` on the event loop; `close()` when the client has left or has all."""

    scheduler: Scheduler
    news: asyncio.Queue[StreamEvent] = field(default_factory=asyncio.Queue)
    handle: RequestHandle | None = None
    submitted: bool = False
    closed: bool = False
    released: bool = False

    async def submit(self, request: Request) -> RequestHandle:
        """Hand the request to the engine; raises what `Engine.submit` raises."""
        self.submitted = True
        return await self.scheduler.submit(self, request)

    def close(self) -> None:
        """Safe at any time and any number of times. The engine stops at its next step, then the slot is free."""
        self.closed = True
        if self.handle is not None:
            self.handle.cancel()
        elif not self.submitted:
            self.release()

    def release(self) -> None:
        """Give the slot back, once."""
        if not self.released:
            self.released = True
            self.scheduler.in_use -= 1


class _Submission(NamedTuple):
    ticket: Ticket
    request: Request
    accepted: asyncio.Future[RequestHandle]


class Scheduler:
    """Owns the engine's thread. Everything but `_run` and what it calls happens on the event loop.

    `limit` requests share the engine's batch and `queue_limit` more may wait; the next one is refused at once.
    """

    def __init__(self, engine: EngineLike, limit: int, queue_limit: int) -> None:
        self.engine = engine
        self.limit = limit
        self.capacity = limit + queue_limit
        self.in_use = 0
        self.failure = ""  # why the engine is given up, if it is
        self.on_failure: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._inbox: list[_Submission] = []
        self._active: list[tuple[Ticket, RequestHandle]] = []
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

    def admit(self) -> Ticket:
        """A slot, or `ServeError` (503) when running and waiting places are all taken."""
        if self.failure:
            raise ServeError(ErrorType.NOT_READY, "The model has failed and is being restarted.", retry_after=10)
        if self.in_use >= self.capacity:
            raise ServeError(
                ErrorType.OVERLOADED,
                f"All {self.limit} places are taken and {self.capacity - self.limit} requests wait; try again shortly.",
                retry_after=2,
            )
        self.in_use += 1
        return Ticket(self)

    async def submit(self, ticket: Ticket, request: Request) -> RequestHandle:
        """See `Ticket.submit`."""
        submission = _Submission(ticket, request, self._loop.create_future())
        with self._condition:
            self._inbox.append(submission)
            self._condition.notify()
        return await submission.accepted

    async def stop(self) -> None:
        """Abort what still runs and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join, 30)
        await asyncio.sleep(0)  # the last events are on their way to the loop

    # The engine's thread.

    def _run(self) -> None:
        while True:
            with self._condition:
                submissions, self._inbox = self._inbox, []
                stopping = self._stopping
            for submission in submissions:
                self._submit(submission)
            if stopping:
                self.engine.abort("the worker is stopping")
                self._deliver()
                return
            busy = True
            try:
                busy = self.engine.step()
            except Exception as error:  # whatever a model raises must reach the clients of this step, and only them
                self._recover(error)
            self._deliver()
            with self._condition:
                if not (busy or self._inbox or self._stopping):
                    self._condition.wait()

    def _submit(self, submission: _Submission) -> None:
        if submission.ticket.closed:
            self._call(self._answer, submission, ServeError(ErrorType.BAD_REQUEST, "The client has left."))
            return
        try:
            handle = self.engine.submit(submission.request)
        except Exception as error:  # refusals, and defects, belong to whoever submitted
            self._call(self._answer, submission, error)
            return
        self._active.append((submission.ticket, handle))
        self._call(self._answer, submission, handle)

    def _recover(self, error: Exception) -> None:
        """After a failed step: fail the requests that were in it, keep the engine usable, or give it up."""
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
        for ticket, handle in list(self._active):
            completion = handle.completion  # read before the text, which is complete once this is set
            text = handle.take()
            if text or completion is not None:
                events.append((ticket, StreamEvent(text, completion)))
            if completion is not None:
                self._active.remove((ticket, handle))
                if completion.finish_reason != "error":
                    self._failures = 0
        if events:
            self._call(_hand_over, events)

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("The event loop has ended; nobody is left to tell.")

    # Back on the event loop.

    @staticmethod
    def _answer(submission: _Submission, outcome: RequestHandle | Exception) -> None:
        ticket, _, accepted = submission
        if isinstance(outcome, Exception):
            ticket.release()
            if not accepted.done():
                accepted.set_exception(outcome)
            return
        ticket.handle = outcome
        if ticket.closed:
            outcome.cancel()
        if not accepted.done():
            accepted.set_result(outcome)


def _hand_over(events: list[tuple[Ticket, StreamEvent]]) -> None:
    for ticket, news in events:
        if news.completion is not None:
            ticket.release()
        ticket.news.put_nowait(news)


def _is_failed(handle: RequestHandle) -> bool:
    return handle.completion is not None and handle.completion.finish_reason == "error"


def failure_of(completion: Completion) -> ServeError:
    """What the client of a failed request is told: nothing of the exception's own text."""
    text = (completion.error or "").lower()
    if "outofmemory" in text or "out of memory" in text:
        message = "The model ran out of memory on this request; send fewer or smaller pictures, or a shorter text."
        return ServeError(ErrorType.OUT_OF_MEMORY, message)
    return ServeError(ErrorType.INTERNAL, "The model failed on this request; the worker's log has the details.")
