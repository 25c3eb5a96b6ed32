"""Download from untrusted https URLs, guarded against server-side request forgery.

The host is resolved once, all its addresses must be public, and the connection uses the address that was checked, which
defeats DNS rebinding. Redirects pass the same checks.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import closing, suppress
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from llava.errors import ImageError

_MAX_REDIRECTS: Final = 3
# IPv6 ranges that embed an IPv4 address, which may be a private one.
_TUNNELS: Final = tuple(
    ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)


def download(url: str, max_bytes: int, *, timeout: float = 10.0, unsafe_local: bool = False) -> bytes:
    """Return the body of `url`, of at most `max_bytes` bytes, within `timeout` seconds in total.

    Raises `ImageError` for a scheme other than https, a host with any non-public address, more than three redirects, a
    status other than 200, a larger body or a slower transfer. `unsafe_local` (for tests) allows http and restricts
    addresses to loopback.
    """
    deadline = time.monotonic() + timeout
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            status, location, body = _get(url, max_bytes, deadline, unsafe_local)
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise ImageError(f"Fetching {url} took longer than {timeout:g} seconds.") from error
            raise ImageError(f"Cannot fetch {url}: {error}.") from error
        if time.monotonic() >= deadline:
            raise ImageError(f"Fetching {url} took longer than {timeout:g} seconds.")
        if status == 200:
            return body
        if status not in (301, 302, 303, 307, 308) or not location:
            raise ImageError(f"Cannot fetch {url}: the server answered with status {status}.")
        url = urljoin(url, location)
    raise ImageError(f"Cannot fetch {url}: more than {_MAX_REDIRECTS} redirects.")


def _get(url: str, max_bytes: int, deadline: float, unsafe_local: bool) -> tuple[int, str | None, bytes]:
    """Send one GET request; returns status, redirect target and body."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (unsafe_local and parts.scheme == "http"):
        raise ImageError(f"Cannot fetch {url}: its scheme must be https.")
    remaining = max(0.01, deadline - time.monotonic())
    with closing(_connect(parts, remaining, unsafe_local)) as connection:
        connection.connect()
        # Bounds the whole transfer; the socket's own timeout restarts with every byte.
        timer = threading.Timer(max(0.01, deadline - time.monotonic()), _shutdown, [connection.sock])
        timer.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "llava"})
            response = connection.getresponse()
            body = response.read(max_bytes + 1) if response.status == 200 else b""
        finally:
            timer.cancel()
        if len(body) > max_bytes:
            raise ImageError(f"Cannot fetch {url}: it has more than {max_bytes} bytes.")
        if response.status == 200 and response.length:
            raise ImageError(f"Cannot fetch {url}: the connection was closed before the body was complete.")
        return response.status, response.getheader("Location"), body


def _shutdown(sock: socket.socket) -> None:
    with suppress(OSError):  # already closed
        # Not `sock.shutdown`, which on TLS also drops the session object in use by the reading thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _connect(parts: SplitResult, timeout: float, unsafe_local: bool) -> http.client.HTTPConnection:
    """An unconnected connection, pinned to the address checked here."""
    host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    if not host:
        raise ImageError(f"Cannot fetch {parts.geturl()}: it has no host.")
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in addresses:
        if not (ipaddress.ip_address(address).is_loopback if unsafe_local else _is_public(address)):
            raise ImageError(f"Cannot fetch {parts.geturl()}: {host} is not a public address.")
    pinned = sorted(addresses, key=lambda address: ":" in address)[0]  # IPv4 first
    if parts.scheme == "http":
        return http.client.HTTPConnection(pinned, port, timeout=timeout)
    return _PinnedConnection(host, port, pinned, timeout)


class _PinnedConnection(http.client.HTTPSConnection):
    """TLS to a given address, with the certificate and Host header of the host name."""

    def __init__(self, host: str, port: int, address: str, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address = address
        self._tls = ssl.create_default_context()

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.is_global and not ip.is_multicast and not any(ip in tunnel for tunnel in _TUNNELS)
