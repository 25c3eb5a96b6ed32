"""Socket binding, and serving with graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from llava.errors import ConfigError
from llava.serve.common.arguments import ServeArgs
from llava.serve.common.security import bind_host, cluster_token
from llava.utils import build_logger

logger = logging.getLogger(__name__)
_LINGER: Final = 2.0  # seconds, for the last bytes of answers


def open_socket(args: ServeArgs) -> tuple[socket.socket, str | None]:
    """Set up the log and bind the server's socket; returns the socket and the shared token, if there is one."""
    build_logger("llava.serve", args.log_file)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    token = cluster_token(args.token_file)
    host = bind_host(args.host, protected=token is not None, insecure=args.insecure)
    return bind_socket(host, args.port), token


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a TCP socket; port 0 selects any free port. Raises `ConfigError` when the address is not available."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be between 1 and 65535, or 0 for any free port, got {port}.")
    try:
        info = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], info[1])
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Cannot listen on {host}:{port} ({error}); choose another --host.") from error
    try:
        if sys.platform != "win32":  # on Windows the option lets two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
    except (OSError, OverflowError) as error:
        sock.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port} ({error}); choose another --port or stop the program that uses it."
        ) from error
    return sock


def bind_free(host: str, first: int, tries: int = 100) -> socket.socket:
    """Bind the first free port from `first`, any free one after `tries`."""
    for port in range(first, first + tries):
        with contextlib.suppress(ConfigError):
            return bind_socket(host, port)
    return bind_socket(host, 0)


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


class GracefulServer(uvicorn.Server):
    """Uvicorn server whose first SIGTERM or SIGINT awaits `drain` before it stops; a second one stops it at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; connections still in use after `_LINGER` seconds, such as a page's heartbeat, are closed.

        Their applications see a disconnect, while uvicorn would cancel them and log a traceback for each.
        """
        closing = asyncio.get_running_loop().call_later(_LINGER, self._close_connections)
        await super().shutdown(sockets)
        closing.cancel()

    def _close_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log the address once connections are accepted and signal handlers are installed."""
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
            logger.info("Stopping: new requests are refused, running requests may finish.")
            self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


def serve(app: ASGIApp, sock: socket.socket, drain: Callable[[], Awaitable[None]]) -> int:
    """Serve `app` on `sock` until a signal stops it; returns the exit status."""
    with contextlib.suppress(KeyboardInterrupt):
        GracefulServer(server_config(app), drain).run(sockets=[sock])
    return 0


def server_config(app: ASGIApp) -> uvicorn.Config:
    """Settings of uvicorn, the same on every machine.

    The HTTP parser is h11 even where httptools is installed: httptools drops the body of a request that offers an
    upgrade to HTTP/2 (`Upgrade: h2c`, as the JDK's HttpClient does).
    """
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        http="h11",
        ws="none",
    )
