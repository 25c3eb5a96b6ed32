"""Model list of the web page, cached for two seconds, with the reason when it is empty."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Final

from llava.serve.common.protocol import ServeError, WorkerView
from llava.serve.web.client import ServiceClient

logger = logging.getLogger(__name__)
LIFETIME: Final = 2.0
_REFRESH_LIFETIME: Final = 30.0


@dataclass(frozen=True)
class Listing:
    """Names of the served models, or the reason why there are none."""

    models: tuple[str, ...] = ()
    reason: str = ""


class ModelCatalog:
    """Models of a controller, shared by all visitors.

    `mode` "reload" updates the list; "once" keeps the first list that is not empty.
    """

    def __init__(self, client: ServiceClient, *, mode: str = "once", default_model: str | None = None) -> None:
        self.client = client
        self.mode = mode
        self.default_model = default_model
        self.infos: dict[str, WorkerView] = {}
        self._listing = Listing(reason="The list of models has not been requested yet.")
        self._fetched = self._refreshed = -_REFRESH_LIFETIME
        self._lock = asyncio.Lock()

    async def listing(self, *, refresh: bool = False) -> Listing:
        """The current list. `refresh` makes the controller query its workers first, at most every 30 seconds."""
        async with self._lock:
            if self.mode == "once" and self._listing.models:
                return self._listing
            now = time.monotonic()
            due = refresh and now - self._refreshed >= _REFRESH_LIFETIME
            if due or now - self._fetched >= LIFETIME:
                self._listing = await self._fetch(due)
                self._fetched = time.monotonic()
            return self._listing

    def preferred(self, listing: Listing) -> str | None:
        """The model selected on a new page: the default model if it is served, else the first."""
        if self.default_model in listing.models:
            return self.default_model
        return listing.models[0] if listing.models else None

    async def _fetch(self, refresh: bool) -> Listing:
        try:
            if refresh:
                self._refreshed = time.monotonic()
                await self.client.refresh()
            models = await self.client.models()
            workers = await self.client.workers()
        except ServeError as error:
            logger.warning("Cannot get the list of models from %s: %s", self.client.controller_url, error.message)
            return Listing(reason=f"Cannot list models: {error.message}. The list is updated automatically.")
        self.infos = {name: worker for worker in workers for name in worker.models}
        return Listing(tuple(models), "" if models else _reason_empty(workers))


def _reason_empty(workers: list[WorkerView]) -> str:
    progress = {name: f"{name} ({w.progress} %)" if w.progress else name for w in workers for name in w.loading}
    loading = [progress[name] for name in sorted(progress)]
    if loading:
        return f"The worker is still loading {', '.join(loading)}; the list is updated automatically."
    if workers:
        states = ", ".join(sorted({worker.state for worker in workers}))
        return f"{len(workers)} worker(s) are registered, but none is ready (state: {states})."
    return "No worker has registered with the controller yet. Start one; the list is updated automatically."
