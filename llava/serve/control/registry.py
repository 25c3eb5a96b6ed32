"""The controller's list of workers: who serves which model, who is alive, and who gets the next request.

No input or output in here, and the clock is given: so expiry and dispatch are tested without waiting.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Literal

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.serve.common.protocol import WorkerStatus, WorkerView

Dispatch = Literal["lottery", "shortest_queue"]
_QUARANTINE_AFTER: Final = 3  # failures in a row
_QUARANTINE_SECONDS: Final = 30.0
_MAX_WORKERS: Final = 1024


@dataclass(eq=False)
class Entry:
    """A worker. `probed` once it has answered at its own address; until then nothing it says is used."""

    address: str
    check_heart_beat: bool
    last_heart_beat: float
    status: WorkerStatus
    probed: bool = False
    queue_length: float = 0.0
    failures: int = 0
    last_failure: float = field(default=-1e9)


class Registry:
    """Entries by address. Safe from several threads; every method is short."""

    def __init__(
        self,
        dispatch: Dispatch = "shortest_queue",
        *,
        expiration: float = CONTROLLER_HEART_BEAT_EXPIRATION,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.dispatch = dispatch
        self.expiration = expiration
        self._clock = clock
        self._rng = rng or random.Random()
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    @property
    def full(self) -> bool:
        return len(self._entries) >= _MAX_WORKERS

    def put(self, address: str, check_heart_beat: bool, status: WorkerStatus, *, probed: bool) -> None:
        """Insert or overwrite; an entry keeps its place in the order, and what was proven stays so."""
        with self._lock:
            old = self._entries.get(address)
            self._entries[address] = Entry(
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
        """Note a sign of life; False for a worker that is not known and must register."""
        with self._lock:
            entry = self._entries.get(address)
            if entry is None:
                return False
            entry.last_heart_beat, entry.queue_length = self._clock(), queue_length
            return True

    def update(self, entry: Entry, status: WorkerStatus) -> None:
        """Note what a known worker answered to a probe; its heartbeats are its own business."""
        with self._lock:
            if self._entries.get(entry.address) is entry:
                entry.status, entry.probed, entry.queue_length = status, True, status.queue_length

    def is_fresh(self, entry: Entry) -> bool:
        """Whether it sends heartbeats and one came lately."""
        return entry.check_heart_beat and self._clock() - entry.last_heart_beat <= self.expiration

    def sweep(self) -> list[str]:
        """Remove and return those whose heartbeats have stopped, and those that never answered a probe."""
        with self._lock:
            limit = self._clock() - self.expiration
            late = [
                entry.address
                for entry in self._entries.values()
                if entry.last_heart_beat < limit and (entry.check_heart_beat or not entry.probed)
            ]
            for address in late:
                del self._entries[address]
            return late

    def models(self) -> list[str]:
        """Names served now, sorted."""
        return sorted({name for entry in self.entries() if entry.probed for name in entry.status.model_names})

    def status_of(self, model: str) -> WorkerStatus | None:
        """The status of one of its workers: what a client has to know about the model."""
        return next((e.status for e in self.entries() if e.probed and model in e.status.model_names), None)

    def is_claimed(self, model: str) -> bool:
        """Whether a worker says that it serves the model, proven or not."""
        return any(model in entry.status.model_names for entry in self.entries())

    def pick(self, model: str, exclude: Collection[str] = ()) -> str:
        """The address for the next request, "" when no eligible worker serves the model (spec/serve.md §3.4).

        A worker that failed three times in a row is asked only when no other can be, for half a minute.
        """
        with self._lock:
            able = [
                e
                for e in self._entries.values()
                if e.probed and e.status.speed > 0 and e.address not in exclude and model in e.status.model_names
            ]
            healthy = [entry for entry in able if not self._quarantined(entry)]
            able = healthy or able
            if not able:
                return ""
            if self.dispatch == "lottery":
                return self._rng.choices(able, [entry.status.speed for entry in able])[0].address
            chosen = min(able, key=lambda entry: entry.queue_length / entry.status.speed)
            chosen.queue_length += 1  # until its next heartbeat says how it is
            return chosen.address

    def _quarantined(self, entry: Entry) -> bool:
        recent = self._clock() - entry.last_failure < _QUARANTINE_SECONDS
        return entry.failures >= _QUARANTINE_AFTER and recent

    def report(self, address: str, *, ok: bool) -> None:
        """How a request to this worker went."""
        with self._lock:
            entry = self._entries.get(address)
            if entry is None:
                return
            entry.failures = 0 if ok else entry.failures + 1
            if not ok:
                entry.last_failure = self._clock()

    def total(self) -> WorkerStatus:
        """All workers as if they were one, for a parent controller (spec/serve.md §3.6)."""
        probed = [entry for entry in self.entries() if entry.probed]
        features = [set(entry.status.features) for entry in probed if entry.status.model_names]
        models = self.models()
        first = self.status_of(models[0]) if len(models) == 1 else None
        return WorkerStatus(
            model_names=models[:64],
            speed=float(sum(entry.status.speed for entry in probed)),
            queue_length=sum(entry.queue_length for entry in probed),
            features=sorted(set.intersection(*features)) if features else [],
            info=first.info if first is not None else None,
        )

    def views(self) -> list[WorkerView]:
        """Every worker as people may see it."""
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
