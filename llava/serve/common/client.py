"""Synchronous HTTP client of the command-line tools for controllers and workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from llava.errors import ConfigError
from llava.serve.common.protocol import Frame, FrameReader
from llava.serve.common.security import authorization, cluster_token


class Client:
    """HTTP client and context manager; every failure raises `ConfigError`.

    `token_file` holds the shared token, as for the servers; `timeout` is in seconds.
    """

    def __init__(self, token_file: Path | None = None, *, timeout: float = 10.0) -> None:
        headers = {"User-Agent": "LLaVA Client", **authorization(cluster_token(token_file))}
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def post(self, address: str, path: str, body: object = None) -> Any:
        """POST `body` as JSON and return the decoded reply."""
        try:
            reply = self._http.post(address.rstrip("/") + path, json=body)
            content = reply.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"Cannot reach {address}{path}: {error or type(error).__name__}.") from error
        if reply.is_error:
            detail = content.get("detail") if isinstance(content, dict) else content
            raise ConfigError(f"{address}{path} returned status {reply.status_code}: {detail}")
        return content

    def stream(self, address: str, body: Mapping[str, object], idle: float = 120.0) -> Iterator[Frame]:
        """Frames of `/worker_generate_stream`; `idle` is the longest silence in seconds."""
        reader = FrameReader()
        url = address.rstrip("/") + "/worker_generate_stream"
        try:
            with self._http.stream("POST", url, json=body, timeout=idle) as response:
                for data in response.iter_bytes():
                    yield from reader.feed(data)
                yield from reader.close()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"The stream from {address} failed: {error or type(error).__name__}.") from error
