"""Asking a judge: any server with OpenAI's `/chat/completions`. Replies are cached on disk, passing failures retried.

The address is `--base-url`, else `OPENAI_BASE_URL`, else OpenAI's; the key `OPENAI_API_KEY`. Nothing else is contacted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llava.errors import ConfigError
from llava.eval.run.answers import cut_torn_line
from llava.eval.run.endpoint import address, chat
from llava.eval.run.files import read_rows
from llava.files import write_errors

OPENAI: Final = "https://api.openai.com/v1"


def base_url(given: str | None) -> str:
    """Address of the judge's API, without a slash at the end."""
    return address(given or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE") or OPENAI)


@dataclass
class Judge:
    """A model behind an address. `cache` is a file of JSON Lines, created at need; None keeps nothing."""

    model: str
    url: str
    max_tokens: int = 1024
    temperature: float = 0.2
    cache: Path | None = None
    tries: int = 6
    timeout: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    _known: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.url == OPENAI and not os.environ.get("OPENAI_API_KEY"):
            raise ConfigError("OPENAI_API_KEY is not set; set it, or name another judge by OPENAI_BASE_URL.")
        if self.cache is not None and self.cache.is_file():
            cut_torn_line(self.cache)
            self._known = {row["key"]: row["reply"] for row in read_rows(self.cache, "key", "reply")}

    def record(self) -> dict[str, Any]:
        """What decides the replies, to be kept beside the scores."""
        return {
            "model": self.model, "url": self.url, "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip

    def ask(self, user: str, system: str | None = None, *, afresh: bool = False) -> str:
        """The reply to a message; `afresh` does not accept a cached one. `RequestError` when the judge gives none."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        body = {
            "model": self.model, "messages": [*messages, {"role": "user", "content": user}],
            "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()
        if afresh or key not in self._known:
            self._known[key] = chat(self.url, body, tries=self.tries, timeout=self.timeout, sleep=self.sleep)
            if self.cache is not None:
                with write_errors(self.cache), self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": self._known[key]}) + "\n")
        return self._known[key]
