"""Judge model behind an OpenAI-compatible API, with replies cached on disk.

The address is `--base-url`, `OPENAI_BASE_URL`, or OpenAI's; the key is `OPENAI_API_KEY`. No other host is contacted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llava.errors import ConfigError
from llava.eval.run.files import read_rows
from llava.eval.run.remote_model import complete, normalize_url
from llava.files import drop_partial_line, write_errors

OPENAI_URL: Final = "https://api.openai.com/v1"


def base_url(given: str | None) -> str:
    """Base URL of the judge's API, without a trailing slash."""
    url = given or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE") or OPENAI_URL
    return normalize_url(url)


@dataclass
class Judge:
    """A model at a URL. `cache` is a JSON Lines file of replies, None to keep them in memory only."""

    model: str
    url: str
    max_tokens: int = 1024
    temperature: float = 0.2
    cache: Path | None = None
    tries: int = 6
    timeout: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    _replies: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.url == OPENAI_URL and not os.environ.get("OPENAI_API_KEY"):
            raise ConfigError("OPENAI_API_KEY is not set; set it, or OPENAI_BASE_URL for another judge.")
        if self.cache is not None and self.cache.is_file():
            drop_partial_line(self.cache)
            self._replies = {row["key"]: row["reply"] for row in read_rows(self.cache, "key", "reply")}

    def settings(self) -> dict[str, str | int | float]:
        """The settings that determine the replies, recorded with the scores."""
        return {
            "model": self.model, "url": self.url, "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip

    def ask(self, user: str, system: str | None = None, *, use_cache: bool = True) -> str:
        """The reply to a message. Raises `RequestError` if the server gives none."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        body = {
            "model": self.model, "messages": [*messages, {"role": "user", "content": user}],
            "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()
        if not use_cache or key not in self._replies:
            reply = complete(self.url, body, tries=self.tries, timeout=self.timeout, sleep=self.sleep)
            self._replies[key] = reply.text
            if self.cache is not None:
                with write_errors(self.cache), self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": self._replies[key]}) + "\n")
        return self._replies[key]
