"""Asynchronous client of the controller for workers: status probes and streams, limited in time and size."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, cast

import httpx
from pydantic import ValidationError

from llava.serve.common.middleware import STREAM_PATH
from llava.serve.common.protocol import ErrorType, FrameReader, ServeError, WorkerStatus
from llava.serve.common.security import authorization
from llava.serve.control.registry import Registry

logger = logging.getLogger(__name__)

_STATUS_BYTES: Final = 2**18
_REPLY_BYTES: Final = 2**25
_REFUSAL_BYTES: Final = 2**16
_MAX_TRIES: Final = 3


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds: connecting to a worker, a status probe, and silence within a stream."""

    connect: float = 3.0
    status: float = 5.0
    idle: float = 60.0


class WorkerStream:
    """Open stream of a worker; read `frames()` once, and call `aclose`."""

    def __init__(self, address: str, response: httpx.Response, registry: Registry) -> None:
        self.address = address
        self._response = response
        self._registry = registry
        self._stopped = False

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Unparsed frames without their NUL; raises `ServeError` when the connection fails or times out."""
        reader = FrameReader()
        last = b""
        try:
            async for data in self._response.aiter_bytes():
                for last in reader.split(data):
                    yield last
        except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
            if b'"finish_reason"' in last:
                return  # the answer was complete
            if self._stopped:
                message = "The controller was stopped before the answer was complete; send the request again."
                raise ServeError(ErrorType.WORKER_UNAVAILABLE, message) from error
            self._registry.report(self.address, ok=False)
            raise _connection_error(error) from error
        self._registry.report(self.address, ok=True)

    async def stop(self) -> None:
        """Close the stream before the answer is complete; `frames` raises `ServeError`."""
        self._stopped = True
        await self.aclose()

    async def body(self) -> bytes:
        """The body of a reply that is not streamed; raises `ServeError` like `frames`."""
        try:
            content = await read_start(self._response, _REPLY_BYTES)
        except (httpx.HTTPError, httpx.StreamError) as error:
            self._registry.report(self.address, ok=False)
            raise _connection_error(error) from error
        finally:
            await self.aclose()
        self._registry.report(self.address, ok=True)
        return content

    async def aclose(self) -> None:
        await self._response.aclose()


class _ReleasedBody(httpx.AsyncByteStream):
    """Request body that is freed once sent; httpx keeps the request itself until its response ends."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content, self._content = self._content, b""
        yield content


class WorkerClient:
    """HTTP client for all workers; ignores redirects and proxies of the environment."""

    def __init__(self, registry: Registry, token: str | None, timeouts: Timeouts | None = None) -> None:
        self.registry = registry
        self.timeouts = timeouts or Timeouts()
        self._http = httpx.AsyncClient(
            headers=authorization(token),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(self.timeouts.idle, connect=self.timeouts.connect),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def probe(self, address: str) -> WorkerStatus | None:
        """The worker's status; None when it does not return a valid one in time."""
        try:
            return await asyncio.wait_for(self._status(address), self.timeouts.status)
        except (httpx.HTTPError, httpx.InvalidURL, asyncio.TimeoutError, ValidationError, OSError) as error:
            logger.info("A worker did not answer a status query (%s).", type(error).__name__)
            return None

    async def _status(self, address: str) -> WorkerStatus:
        async with self._http.stream("POST", f"{address}/worker_get_status") as response:
            response.raise_for_status()
            return WorkerStatus.model_validate_json(await read_start(response, _STATUS_BYTES))

    async def open(self, model: str, content: bytes, request_id: str, path: str = STREAM_PATH) -> WorkerStream:
        """Send a request to a worker of `model`, and to the next one if it is unreachable or full.

        Raises the `ServeError` of the last worker tried.
        """
        tried: list[str] = []
        refusal = ServeError(ErrorType.NOT_FOUND, "No worker serves this model; see /list_models.")
        if self.registry.is_claimed(model):
            refusal = ServeError(ErrorType.WORKER_UNAVAILABLE, "The model's worker cannot be reached.")
        while len(tried) < _MAX_TRIES and (address := self.registry.pick(model, exclude=tried)):
            tried.append(address)
            try:
                return WorkerStream(address, await self._send(address, path, content, request_id), self.registry)
            except ServeError as error:
                refusal = error
                if error.kind not in (ErrorType.WORKER_UNAVAILABLE, ErrorType.OVERLOADED, ErrorType.NOT_READY):
                    raise
        raise refusal

    async def _send(self, address: str, path: str, content: bytes, request_id: str) -> httpx.Response:
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "X-Request-Id": request_id,
            "User-Agent": "LLaVA Controller",
        }
        request = self._http.build_request("POST", address + path, content=_ReleasedBody(content), headers=headers)
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code == 200:
                return response
            try:
                raise await _refusal(response)
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.registry.report(address, ok=False)
            raise _connection_error(error) from error


async def read_start(response: httpx.Response, limit: int = _REFUSAL_BYTES) -> bytes:
    """The first `limit` bytes of the body; a server may send without end."""
    body = b""
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_bytes())) as parts:
        async for part in parts:
            body += part
            if len(body) > limit:
                break
    return body[:limit]


async def _refusal(response: httpx.Response) -> ServeError:
    """The error of a worker that refused to stream."""
    body = await read_start(response)
    try:
        error = next(iter(FrameReader().feed(body + b"\0")))["error"]
        kind = ErrorType.from_wire(error["type"])
        facts = {key: value for key, value in error.items() if key not in ("type", "message", "request_id")}
        wait = response.headers.get("Retry-After", "")
        return ServeError(kind, str(error["message"]), retry_after=float(wait) if wait.isdigit() else None, **facts)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        if response.status_code in (429, 503):
            return ServeError(ErrorType.OVERLOADED, "The worker is busy; try again shortly.", retry_after=2)
        return ServeError(ErrorType.WORKER_UNAVAILABLE, f"The worker returned status {response.status_code}.")


def _connection_error(error: Exception) -> ServeError:
    if isinstance(error, httpx.ReadTimeout):
        return ServeError(ErrorType.TIMEOUT, "The worker stopped responding.")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker cannot be reached.")
    return ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker closed the connection before the answer was complete.")
