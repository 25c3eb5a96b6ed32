"""The list of models on the page: asked for at most once every two seconds, and with the reason when it is empty."""

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
    """Models in the order of the drop-down, and why there are none."""

    models: tuple[str, ...] = ()
    reason: str = ""


class ModelCatalog:
    """What the controller serves, for every page of this web server.

    `mode` "reload" keeps the list current; "once" keeps the first list that is not empty. Start order does not
    matter in either.
    """

    def __init__(self, client: ServiceClient, *, mode: str = "once", default_model: str | None = None) -> None:
        self.client = client
        self.mode = mode
        self.default_model = default_model
        self.infos: dict[str, WorkerView] = {}
        self._listing = Listing(reason="The list of models has not been asked for yet.")
        self._asked = self._refreshed = -_REFRESH_LIFETIME
        self._lock = asyncio.Lock()

    async def listing(self, *, refresh: bool = False) -> Listing:
        """The models now. `refresh` has the controller ask its workers first, at most every 30 seconds."""
        async with self._lock:
            if self.mode == "once" and self._listing.models:
                return self._listing
            now = time.monotonic()
            due = refresh and now - self._refreshed >= _REFRESH_LIFETIME
            if due or now - self._asked >= LIFETIME:
                self._listing = await self._fetch(due)
                self._asked = time.monotonic()
            return self._listing

    def preferred(self, listing: Listing) -> str | None:
        """The model to begin with: the default if it is there, else the first."""
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
            logger.warning("No list of models from %s: %s", self.client.controller_url, error.message)
            return Listing(reason=f"No model can be listed: {error.message}. It appears here as soon as it can.")
        self.infos = {name: worker for worker in workers for name in worker.models}
        return Listing(tuple(models), "" if models else _why_empty(workers))


def _why_empty(workers: list[WorkerView]) -> str:
    far = {name: f"{name} ({w.progress} %)" if w.progress else name for w in workers for name in w.loading}
    loading = [far[name] for name in sorted(far)]
    if loading:
        return f"The worker is still loading {', '.join(loading)}; it appears here by itself."
    if workers:
        states = ", ".join(sorted({worker.state for worker in workers}))
        return f"{len(workers)} worker(s) are registered, but none is ready (state: {states})."
    return "The controller answers, but no worker has registered with it yet. Start one; it appears here by itself."
