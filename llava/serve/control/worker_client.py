"""How the controller talks to workers: status queries and streams, both with limits on time and size."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, cast

import httpx
from pydantic import ValidationError

from llava.serve.common.protocol import ErrorType, FrameReader, ServeError, WorkerStatus
from llava.serve.common.security import authorization
from llava.serve.control.registry import Registry

logger = logging.getLogger(__name__)

_STATUS_BYTES: Final = 2**18
_REFUSAL_BYTES: Final = 2**16
_MAX_TRIES: Final = 3


@dataclass(frozen=True)
class Times:
    """Seconds that a worker gets: to accept a connection, to answer a status query, and between bytes of a stream."""

    connect: float = 3.0
    status: float = 5.0
    idle: float = 60.0


class WorkerStream:
    """A stream opened at a worker; `frames()` may be read once, and `aclose` must be called."""

    def __init__(self, address: str, response: httpx.Response, registry: Registry) -> None:
        self.address = address
        self._response = response
        self._registry = registry

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Frames as bytes without their NUL; raises `ServeError` when the worker breaks off or falls silent."""
        reader = FrameReader()
        last = b""
        try:
            async for data in self._response.aiter_bytes():
                for last in reader.split(data):
                    yield last
        except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
            if b'"finish_reason"' in last:
                return  # it had said everything
            self._registry.report(self.address, ok=False)
            raise _broken(error) from error
        self._registry.report(self.address, ok=True)

    async def aclose(self) -> None:
        await self._response.aclose()


class _Once(httpx.AsyncByteStream):
    """A body that is let go once it is sent: the client keeps every request until its response ends."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content, self._content = self._content, b""
        yield content


class WorkerClient:
    """One HTTP client for all workers. Redirects and proxies from the environment are never followed."""

    def __init__(self, registry: Registry, token: str | None, times: Times | None = None) -> None:
        self.registry = registry
        self.times = times or Times()
        self._http = httpx.AsyncClient(
            headers=authorization(token),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(self.times.idle, connect=self.times.connect),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def probe(self, address: str) -> WorkerStatus | None:
        """The worker's status, or None if it does not answer in time or not with a status."""
        try:
            return await asyncio.wait_for(self._status(address), self.times.status)
        except (httpx.HTTPError, httpx.InvalidURL, asyncio.TimeoutError, ValidationError, OSError) as error:
            logger.info("A worker does not answer a status query (%s).", type(error).__name__)
            return None

    async def _status(self, address: str) -> WorkerStatus:
        async with self._http.stream("POST", f"{address}/worker_get_status") as response:
            response.raise_for_status()
            return WorkerStatus.model_validate_json(await read_start(response, _STATUS_BYTES))

    async def open(self, model: str, content: bytes, request_id: str) -> WorkerStream:
        """Send a request to a worker of `model`, to another if it cannot be reached or is full.

        Raises `ServeError`: what the last worker said, or that there is none.
        """
        tried: list[str] = []
        refusal = ServeError(ErrorType.NOT_FOUND, "No worker serves this model now; see the list of models.")
        if self.registry.is_claimed(model):
            refusal = ServeError(ErrorType.WORKER_UNAVAILABLE, "The model's worker cannot be reached.")
        while len(tried) < _MAX_TRIES and (address := self.registry.pick(model, exclude=tried)):
            tried.append(address)
            try:
                return WorkerStream(address, await self._send(address, content, request_id), self.registry)
            except ServeError as error:
                refusal = error
                if error.kind not in (ErrorType.WORKER_UNAVAILABLE, ErrorType.OVERLOADED, ErrorType.NOT_READY):
                    raise
        raise refusal

    async def _send(self, address: str, content: bytes, request_id: str) -> httpx.Response:
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "X-Request-Id": request_id,
            "User-Agent": "LLaVA Controller",
        }
        url = f"{address}/worker_generate_stream"
        request = self._http.build_request("POST", url, content=_Once(content), headers=headers)
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code == 200:
                return response
            try:
                raise await _refusal_in(response)
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.registry.report(address, ok=False)
            raise _broken(error) from error


async def read_start(response: httpx.Response, limit: int = _REFUSAL_BYTES) -> bytes:
    """The body as far as `limit` bytes: whoever is asked may send without end."""
    body = b""
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_bytes())) as parts:
        async for part in parts:
            body += part
            if len(body) > limit:
                break
    return body[:limit]


async def _refusal_in(response: httpx.Response) -> ServeError:
    """What a worker said instead of streaming."""
    body = await read_start(response)
    try:
        frame: dict[str, Any] = next(iter(FrameReader().feed(body + b"\0")))
        error = frame["error"]
        kind = ErrorType.from_wire(error["type"])
        facts = {key: value for key, value in error.items() if key not in ("type", "message", "request_id")}
        wait = response.headers.get("Retry-After", "")
        return ServeError(kind, str(error["message"]), retry_after=float(wait) if wait.isdigit() else None, **facts)
    except (ValueError, LookupError, TypeError, StopIteration):
        if response.status_code in (429, 503):
            return ServeError(ErrorType.OVERLOADED, "The worker is busy; try again shortly.", retry_after=2)
        return ServeError(ErrorType.WORKER_UNAVAILABLE, f"The worker answered with status {response.status_code}.")


def _broken(error: Exception) -> ServeError:
    if isinstance(error, httpx.ReadTimeout):
        return ServeError(ErrorType.TIMEOUT, "The worker has stopped answering.")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker cannot be reached.")
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker broke off.")
