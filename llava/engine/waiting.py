"""Waiting requests, and the choice of those whose prefill starts or continues in a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from llava.engine.prefill import ChunkedPrefill, Prefiller
from llava.engine.sequence import Prompt, Sequence
from llava.engine.token_budget import StepBudget


class WaitingQueue:
    """Requests in order of arrival, and in `chunked` the one whose prefill takes several steps.

    At most `max_batch_size` requests run, whose keys and values take at most `kv_cache_bytes`.
    """

    def __init__(
        self, prefiller: Prefiller, max_batch_size: int, kv_cache_bytes: int | None, bytes_per_token: int
    ) -> None:
        self.prefiller = prefiller
        self.max_batch_size = max_batch_size
        self.kv_cache_bytes = kv_cache_bytes
        self.bytes_per_token = bytes_per_token
        self.chunked: tuple[Sequence, ChunkedPrefill] | None = None
        self.started = 0
        self.waiting_seconds = 0.0  # of the started requests
        self._queue: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._queue) + (self.chunked is not None)

    def __iter__(self) -> Iterator[Sequence]:
        """All requests; other threads may append."""
        return iter([*([self.chunked[0]] if self.chunked else []), *list(self._queue)])

    def append(self, sequence: Sequence) -> None:
        self._queue.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a request, if it is still here."""
        if self.chunked is not None and self.chunked[0] is sequence:
            self.chunked = None
        elif sequence in self._queue:
            self._queue.remove(sequence)

    def clear(self) -> None:
        self.chunked = None
        self._queue.clear()

    def next_prompts(self, count: int) -> list[Prompt]:
        """Prompts of the next requests to start."""
        return [sequence.prompt for sequence in list(self._queue)[:count]]

    def schedule(self, running: list[Sequence], budget: StepBudget) -> list[Sequence]:
        """Remove and return the requests to prefill as a whole now; the next one may become `chunked`.

        With a backlog, none starts before a quarter of the batch is free, so that prompts run in batches. Without a
        limit in `budget`, they have at most `max_prefill_tokens` while rows are running. With one, a prompt that does
        not fit runs in chunks; those that fit into half of the budget overtake it, and it has the rest of every step.
        """
        if not budget.least:  # this step is timed without prompts
            return []
        known = [*running, *([self.chunked[0]] if self.chunked else [])]
        free = self.max_batch_size - len(known)
        if running and free < min(len(self._queue), self.max_batch_size // 4):
            return []
        started: list[Sequence] = []
        longest = max((sequence.max_tokens for sequence in known), default=0)
        share = budget.remaining / 2 if self.chunked else budget.remaining
        room = share
        tokens = 0
        while self._queue and len(started) < free:
            sequence = self._queue[0]
            if self.chunked is not None and sequence.needs_chunks:
                break
            new, layers = self.prefiller.new_work(sequence.prompt, started[-1].prompt if started else None)
            tokens += new
            if not budget.is_limited and started and running and tokens > self.prefiller.max_tokens:
                break
            longest = max(longest, sequence.max_tokens)
            bytes_needed = (len(known) + len(started) + 1) * longest * self.bytes_per_token
            if self.kv_cache_bytes is not None and bytes_needed > self.kv_cache_bytes:
                break
            cost = budget.cost(new, layers)
            room -= cost
            if room < 0 and sequence.params.num_beams == 1:
                sequence.needs_chunks = cost > share  # else it fits into a later step
                if self.chunked is None:
                    self.chunked = self._start(), self.prefiller.begin(sequence.prompt)
                break
            budget.spend(new, layers)
            started.append(self._start())
        return started

    def _start(self) -> Sequence:
        sequence = self._queue.popleft()
        self.started += 1
        self.waiting_seconds += time.perf_counter() - sequence.submitted
        return sequence
