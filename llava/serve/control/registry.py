"""Worker registry of the controller: served models, liveness and dispatch. No I/O, and an injectable clock."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.serve.common.arguments import DispatchMethod
from llava.serve.common.protocol import WorkerStatus, WorkerView

_QUARANTINE_AFTER: Final = 3  # consecutive failures
_QUARANTINE_SECONDS: Final = 30.0
_MAX_WORKERS: Final = 1024


@dataclass(eq=False)
class WorkerEntry:
    """A registered worker; its status is used only once it was `probed`, that is, has answered at its own address."""

    address: str
    check_heart_beat: bool
    last_heart_beat: float
    status: WorkerStatus
    probed: bool = False
    queue_length: float = 0.0
    failures: int = 0
    last_failure: float = field(default=-1e9)


class Registry:
    """Workers by address. Thread-safe; `expiration` is the longest silence between heartbeats in seconds."""

    def __init__(
        self,
        dispatch: DispatchMethod | str = DispatchMethod.SHORTEST_QUEUE,
        *,
        expiration: float = CONTROLLER_HEART_BEAT_EXPIRATION,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.dispatch = DispatchMethod(dispatch)
        self.expiration = expiration
        self._clock = clock
        self._rng = rng or random.Random()
        self._entries: dict[str, WorkerEntry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[WorkerEntry]:
        with self._lock:
            return list(self._entries.values())

    @property
    def full(self) -> bool:
        return len(self._entries) >= _MAX_WORKERS

    def put(self, address: str, check_heart_beat: bool, status: WorkerStatus, *, probed: bool) -> None:
        """Add or replace a worker; an unprobed registration does not replace the status of a probed worker."""
        with self._lock:
            old = self._entries.get(address)
            self._entries[address] = WorkerEntry(
                address,
                check_heart_beat,
                self._clock(),
                status if probed or old is None else old.status,
                probed or (old is not None and old.probed),
                status.queue_length,
            )

    def remove(self, address: str) -> bool:
        with self._lock:
            return self._entries.pop(address, None) is not None

    def heart_beat(self, address: str, queue_length: float) -> bool:
        """Record a heartbeat; False for an unknown worker, which must register."""
        with self._lock:
            entry = self._entries.get(address)
            if entry is None:
                return False
            entry.last_heart_beat, entry.queue_length = self._clock(), queue_length
            return True

    def update(self, entry: WorkerEntry, status: WorkerStatus) -> None:
        """Record the status that a worker returned to a probe."""
        with self._lock:
            if self._entries.get(entry.address) is entry:
                entry.status, entry.probed, entry.queue_length = status, True, status.queue_length

    def is_fresh(self, entry: WorkerEntry) -> bool:
        """Whether the worker sends heartbeats and the last one has not expired."""
        return entry.check_heart_beat and self._clock() - entry.last_heart_beat <= self.expiration

    def remove_expired(self) -> list[str]:
        """Remove workers whose heartbeats have stopped or that never answered a probe; returns their addresses."""
        with self._lock:
            limit = self._clock() - self.expiration
            expired = [
                entry.address
                for entry in self._entries.values()
                if entry.last_heart_beat < limit and (entry.check_heart_beat or not entry.probed)
            ]
            for address in expired:
                del self._entries[address]
            return expired

    def models(self) -> list[str]:
        """Sorted names of the served models."""
        return sorted({name for entry in self.entries() if entry.probed for name in entry.status.model_names})

    def status_of(self, model: str) -> WorkerStatus | None:
        """The status of one of the workers that serve `model`."""
        return next((e.status for e in self.entries() if e.probed and model in e.status.model_names), None)

    def is_claimed(self, model: str) -> bool:
        """Whether any worker, probed or not, has registered for `model`."""
        return any(model in entry.status.model_names for entry in self.entries())

    def pick(self, model: str, exclude: Collection[str] = ()) -> str:
        """Select a worker for the next request; returns its address, empty when no worker serves `model`.

        `lottery` draws with probability proportional to speed, `shortest_queue` minimizes queue length / speed. A
        worker with three consecutive failures is selected only if there is no other, for 30 seconds.
        """
        with self._lock:
            eligible = [
                e
                for e in self._entries.values()
                if e.probed and e.status.speed > 0 and e.address not in exclude and model in e.status.model_names
            ]
            eligible = [entry for entry in eligible if not self._quarantined(entry)] or eligible
            if not eligible:
                return ""
            if self.dispatch is DispatchMethod.LOTTERY:
                return self._rng.choices(eligible, [entry.status.speed for entry in eligible])[0].address
            chosen = min(eligible, key=lambda entry: entry.queue_length / entry.status.speed)
            chosen.queue_length += 1  # the next heartbeat overwrites it
            return chosen.address

    def _quarantined(self, entry: WorkerEntry) -> bool:
        recent = self._clock() - entry.last_failure < _QUARANTINE_SECONDS
        return entry.failures >= _QUARANTINE_AFTER and recent

    def report(self, address: str, *, ok: bool) -> None:
        """Record the outcome of a request to a worker."""
        with self._lock:
            entry = self._entries.get(address)
            if entry is None:
                return
            entry.failures = 0 if ok else entry.failures + 1
            if not ok:
                entry.last_failure = self._clock()

    def total(self) -> WorkerStatus:
        """Status of all workers together, for a parent controller: union of models, sum of speeds and queues."""
        probed = [entry for entry in self.entries() if entry.probed]
        features = [set(entry.status.features) for entry in probed if entry.status.model_names]
        models = self.models()
        first = self.status_of(models[0]) if models else None
        return WorkerStatus(
            model_names=models[:64],
            speed=float(sum(entry.status.speed for entry in probed)),
            queue_length=sum(entry.queue_length for entry in probed),
            features=sorted(set.intersection(*features)) if features else [],
            info=first.info if first is not None and {*first.model_names} == {*models} else None,
        )

    def views(self) -> list[WorkerView]:
        """Public state of every worker."""
        return [
            WorkerView(
                models=entry.status.model_names if entry.probed else [],
                loading=entry.status.loading,
                progress=entry.status.progress,
                state=entry.status.state if entry.probed else "loading",
                queue_length=entry.queue_length,
                features=entry.status.features,
                info=entry.status.info,
            )
            for entry in self.entries()
        ]
