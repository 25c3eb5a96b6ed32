"""Listening and leaving: a socket bound before anything slow, uvicorn on it, and a stop that lets streams finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llava.errors import ConfigError

logger = logging.getLogger(__name__)


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket (port 0: any free one). `ConfigError` when the address is taken or not this machine's."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"There is no port {port}; choose another --port, from 1 to 65535, or 0 for any free one.")
    try:
        info = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], info[1])
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Cannot listen on {host}:{port} ({error}); choose another --host.") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
    except (OSError, OverflowError) as error:
        sock.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port} ({error}); choose another --port or stop its user."
        ) from error
    return sock


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


class GracefulServer(uvicorn.Server):
    """uvicorn, but the first SIGTERM or SIGINT calls `drain` and stops once it is done; a second one stops at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where we listen only now that signals are heeded and connections accepted."""
        await super().startup(sockets)
        for sock in sockets or ():
            host, port = sock.getsockname()[:2]
            logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._draining is None:
            logger.info("Stopping: new requests are refused, running ones may finish.")
            self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


def serve(app: ASGIApp, sock: socket.socket, drain: Callable[[], Awaitable[None]]) -> int:
    """Serve `app` on `sock` until told to stop; the exit status."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        ws="none",
    )
    with contextlib.suppress(KeyboardInterrupt):
        GracefulServer(config, drain).run(sockets=[sock])
    return 0
