"""What the small command-line tools use to talk to controllers and workers: every fault is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from llava.errors import ConfigError
from llava.serve.common.protocol import FrameReader
from llava.serve.common.security import authorization, cluster_token


class Client:
    """A synchronous client; `token_file` as for the servers. Use it in a `with` statement."""

    def __init__(self, token_file: Path | None = None, *, timeout: float = 10.0) -> None:
        headers = {"User-Agent": "LLaVA Client", **authorization(cluster_token(token_file))}
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def post(self, address: str, path: str, body: Any = None) -> Any:
        """The JSON answer; `ConfigError` for one that cannot be had."""
        try:
            reply = self._http.post(address.rstrip("/") + path, json=body)
            answer = reply.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"Cannot ask {address}{path}: {error or type(error).__name__}.") from error
        if reply.is_error:
            told = answer.get("detail") if isinstance(answer, dict) else answer
            raise ConfigError(f"{address}{path} answered with status {reply.status_code}: {told}")
        return answer

    def stream(self, address: str, body: dict[str, Any], idle: float = 120.0) -> Iterator[dict[str, Any]]:
        """Frames of `/worker_generate_stream`; `ConfigError` when the connection fails."""
        reader = FrameReader()
        url = address.rstrip("/") + "/worker_generate_stream"
        try:
            with self._http.stream("POST", url, json=body, timeout=idle) as response:
                for data in response.iter_bytes():
                    yield from reader.feed(data)
                yield from reader.close()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"The stream from {address} broke off: {error or type(error).__name__}.") from error
