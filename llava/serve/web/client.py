"""Asynchronous client of the web page for controllers and workers."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Final, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from llava.errors import ConfigError
from llava.serve.common.arguments import TOKEN_VARIABLE
from llava.serve.common.protocol import ErrorType, Frame, FrameReader, ServeError, WorkerStatus, WorkerView
from llava.serve.web.errors import from_frame, from_response

USER_AGENT: Final = "InternVL-Chat Client"


class _Models(BaseModel):
    models: list[str]


class _Address(BaseModel):
    address: str


T = TypeVar("T")
_WORKERS: Final = TypeAdapter(list[WorkerView])


class ServiceClient:
    """Client of a controller and its workers; every failure raises `ServeError`.

    `timeout` limits queries and connecting to a worker; `idle_timeout` is the longest silence within a stream, also
    of a queued request. Both are in seconds. Redirects and proxies are ignored.
    """

    def __init__(
        self,
        controller_url: str,
        *,
        token: str | None = None,
        timeout: float = 5.0,
        idle_timeout: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.controller_url = controller_url.rstrip("/")
        if not self.controller_url.startswith(("http://", "https://")):
            raise ConfigError(f"The controller URL must begin with http:// or https://, got {controller_url!r}.")
        self._stream_timeout = httpx.Timeout(timeout, read=idle_timeout)
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        headers = {"User-Agent": USER_AGENT, **({"Authorization": f"Bearer {token}"} if token else {})}
        self._http = httpx.AsyncClient(
            headers=headers, timeout=timeout, transport=transport, trust_env=False, follow_redirects=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Sorted names of the served models."""
        reply = await self._post(f"{self.controller_url}/list_models", None)
        return sorted(_parse(TypeAdapter(_Models), reply, "the list of models").models)

    async def workers(self) -> list[WorkerView]:
        """Public state of each worker; empty from controllers without `/list_workers`."""
        try:
            reply = await self._post(f"{self.controller_url}/list_workers", None)
        except ServeError as error:
            if error.kind in (ErrorType.NOT_FOUND, ErrorType.BAD_REQUEST):
                return []
            raise
        content = reply.get("workers", []) if isinstance(reply, dict) else reply
        return _parse(_WORKERS, content, "the list of workers")

    async def refresh(self) -> None:
        """Make the controller query all its workers."""
        await self._post(f"{self.controller_url}/refresh_all_workers", None)

    async def address(self, model: str) -> str:
        """Address of a worker for `model`; the controller counts this as a request in its queue."""
        reply = await self._post(f"{self.controller_url}/get_worker_address", {"model": model})
        address = _parse(TypeAdapter(_Address), reply, "the address of a worker").address.rstrip("/")
        if not address:
            raise ServeError(ErrorType.NOT_FOUND, f"no worker serves {model}")
        return address

    async def status(self, address: str) -> WorkerStatus:
        """Status of a worker: template, limits and features."""
        return _parse(TypeAdapter(WorkerStatus), await self._post(f"{address}/worker_get_status", None), "its status")

    async def stream(self, address: str, body: dict[str, object]) -> AsyncGenerator[Frame, None]:
        """Frames of one answer; closing the generator closes the connection, which stops the worker."""
        reader = FrameReader()
        url = f"{address}/worker_generate_stream"
        try:
            async with self._http.stream("POST", url, json=body, timeout=self._stream_timeout) as response:
                if response.status_code != 200:
                    raise from_response(response.status_code, await response.aread())
                async for chunk in response.aiter_raw():
                    for frame in reader.feed(chunk):
                        yield _checked(frame)
                for frame in reader.close():
                    yield _checked(frame)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unreachable(error, "the worker") from error
        except (ValueError, RecursionError) as error:
            raise ServeError(ErrorType.INTERNAL, f"the worker sent a malformed frame: {error}") from error

    async def _post(self, url: str, body: dict[str, object] | None) -> object:
        """POST `body` and return the decoded JSON reply."""
        who = "the controller" if url.startswith(f"{self.controller_url}/") else "the worker"
        try:
            response = await self._http.post(url, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unreachable(error, who) from error
        if response.status_code != 200:
            raise from_response(response.status_code, response.content)
        try:
            content: object = response.json()
        except (ValueError, RecursionError) as error:
            raise ServeError(ErrorType.INTERNAL, f"{who} did not return JSON") from error
        return content


def _checked(frame: Frame) -> Frame:
    error = from_frame(frame)
    if error is not None:
        raise error
    return frame


def _parse(kind: TypeAdapter[T], content: object, what: str) -> T:
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        raise ServeError(ErrorType.INTERNAL, f"{what} has an unknown format") from error


def _unreachable(error: Exception, who: str) -> ServeError:
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return ServeError(ErrorType.TIMEOUT, f"{who} timed out")
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError):
        return ServeError(ErrorType.WORKER_UNAVAILABLE, f"{who} closed the connection")
    return ServeError(ErrorType.WORKER_UNAVAILABLE, f"cannot connect to {who}")
