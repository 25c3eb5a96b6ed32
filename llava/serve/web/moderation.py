"""Optional moderation of what visitors write: a text that cannot be checked is refused, with the reason."""

from __future__ import annotations

import os

import httpx

from llava.errors import ConfigError
from llava.utils import MODERATION_URL


class Moderator:
    """Asks OpenAI's moderation endpoint about a text (`OPENAI_API_KEY`); raises `ConfigError` without a key."""

    def __init__(
        self, *, url: str = MODERATION_URL, timeout: float = 5.0, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            raise ConfigError("--moderate asks OpenAI's moderation endpoint; set OPENAI_API_KEY or leave it out.")
        self._url = url
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport)

    async def refusal(self, text: str) -> str | None:
        """Why `text` is not sent to a model; None when it may be. Lines are joined with spaces first."""
        try:
            reply = await self._http.post(self._url, json={"input": " ".join(text.split())})
            reply.raise_for_status()
            flagged = reply.json()["results"][0]["flagged"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"Your message could not be checked by the moderation service ({type(error).__name__}); try again."
        return (
            "Your message was found to break the content rules and is not sent; please change it." if flagged else None
        )

    async def close(self) -> None:
        await self._http.aclose()
