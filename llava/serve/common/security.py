"""Access control: tokens and keys, bind addresses, allowed worker addresses, rate limits."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from llava.errors import ConfigError
from llava.serve.common.arguments import TOKEN_VARIABLE
from llava.serve.common.protocol import ErrorType, ServeError

logger = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
LOOPBACK: Final = "127.0.0.1"
_EVERYWHERE: Final = ("0.0.0.0", "::", "")
_MAX_ADDRESS: Final = 256


class ApiKeys:
    """Set of secrets, stored as digests and compared in constant time."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._digests = [_digest(secret.encode()) for secret in secrets]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, secret: bytes) -> bool:
        digest, found = _digest(secret), False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def bearer(header: bytes) -> bytes:
    """The credential of an `Authorization: Bearer …` header; empty for other headers."""
    scheme, _, credential = header.partition(b" ")
    return credential.strip() if scheme.lower() == b"bearer" else b""


def read_secrets(file: Path | None, variable: str) -> list[str]:
    """Secrets from `file`, one per line, else from an environment variable, separated by commas."""
    if file is None:
        return [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the secrets in {file}: {error}.") from error
    secrets = [line for line in lines if line and not line.startswith("#")]
    if not secrets:
        raise ConfigError(f"{file} contains no secret; write one per line.")
    return secrets


def cluster_token(file: Path | None = None) -> str | None:
    """The token shared by controller, workers and web page: first line of `file`, else `LLAVA_TOKEN`, else None."""
    secrets = read_secrets(file, TOKEN_VARIABLE)
    return secrets[0] if secrets else None


def authorization(token: str | None) -> dict[str, str]:
    """The HTTP header that carries the token; empty without a token."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reachable from this machine only."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_host(
    host: str, *, protected: bool, insecure: bool, key: str = "token", how: str = f"{TOKEN_VARIABLE} (or --token-file)"
) -> str:
    """The address to bind: `host`, if it is loopback, `protected` by a `key`, or `insecure` is set.

    Otherwise a wildcard address is replaced by loopback, with a warning, so that the published commands keep working
    on one machine; other addresses raise `ConfigError`.
    """
    if is_loopback(host) or protected:
        return host
    remedy = f"set {how}, or pass --insecure if every machine that can connect is trusted"
    if insecure:
        logger.warning("Listening on %s without a %s: anyone who can connect can use this service.", host, key)
        return host
    if host not in _EVERYWHERE:
        raise ConfigError(f"--host {host} accepts connections from other machines and requires a {key}; {remedy}.")
    logger.warning(
        "--host %s requires a %s: listening on %s, so other machines cannot connect. To accept them, %s.",
        host,
        key,
        LOOPBACK,
        remedy,
    )
    return LOOPBACK


class AddressRule:
    """Rule for the worker addresses that the controller may call: `http(s)://host[:port]` on an allowed host.

    `allowed` holds host patterns (`gpu-*.example.org`) and networks (`10.0.0.0/8`); empty allows every host except
    link-local, multicast and unspecified addresses, which may be cloud metadata services.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._networks = []
        self._patterns = []
        for entry in allowed:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._patterns.append(entry.lower())

    def check(self, address: str) -> str:
        """The address without a trailing slash; `ServeError` (400) when it is not allowed."""
        reason = self._refusal(address)
        if reason:
            raise ServeError(ErrorType.BAD_REQUEST, f"The worker address {reason}; send http://HOST:PORT.")
        return address.removesuffix("/")

    def _refusal(self, address: str) -> str:
        if len(address) > _MAX_ADDRESS or not address.isascii() or any(c.isspace() or c in "\\%" for c in address):
            return "is too long or contains invalid characters"
        try:
            parts = urlsplit(address)
            host, port = parts.hostname, parts.port
        except ValueError:
            return "is malformed"
        if parts.scheme not in ("http", "https"):
            return "is not http or https"
        if not host or port == 0 or "@" in parts.netloc:
            return "must have a host and no user name"
        if parts.path not in ("", "/") or parts.query or parts.fragment or "?" in address or "#" in address:
            return "must not have a path, query or fragment"
        return "" if self._allowed(host) else "is on a host not allowed by --worker-hosts"

    def _allowed(self, host: str) -> bool:
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            return not (self._patterns or self._networks) or any(fnmatchcase(host, p) for p in self._patterns)
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        if mapped.is_link_local or mapped.is_multicast or mapped.is_unspecified:
            return False
        matched = any(mapped in net for net in self._networks) or any(fnmatchcase(host, p) for p in self._patterns)
        return matched or not (self._patterns or self._networks)


LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.0/8", "::1/128")


class RateLimiter:
    """Token bucket per client: `per_minute` answers on average and as burst, for the `remember` latest clients.

    A request passes while a token is left, even if it needs more; the client then waits until the debt is paid off.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic, remember: int = 10_000) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._remember = remember
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # client: (tokens, time)

    def spend(self, client: bytes, answers: int = 1) -> float:
        """Take a token for each of `answers`; returns 0, or the seconds to wait when there is none."""
        now = self._clock()
        most = max(1.0, self.per_minute)
        tokens, when = self._buckets.pop(client, (most, now))
        tokens = min(most, tokens + (now - when) * self.per_minute / 60)
        wait = 0.0 if tokens >= 1 else (1 - tokens) * 60 / self.per_minute
        self._buckets[client] = (tokens if wait else tokens - answers, now)
        while len(self._buckets) > self._remember:
            self._buckets.popitem(last=False)
        return wait
