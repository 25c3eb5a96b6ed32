"""Command-line settings shared by the servers, as dataclasses. Imports no optional package."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llava.errors import ConfigError
from llava.utils import require

if TYPE_CHECKING:
    from typing import Self

TOKEN_VARIABLE: Final = "LLAVA_TOKEN"  # shared by controller, workers and web page; sent as `Authorization: Bearer`
API_KEYS_VARIABLE: Final = "LLAVA_API_KEYS"
LOGINS_VARIABLE: Final = "LLAVA_WEB_LOGINS"
CONTROLLER_URL: Final = "http://localhost:21001"


class DispatchMethod(Enum):
    """Selection of a worker among those that serve a model."""

    LOTTERY = "lottery"  # at random, weighted by speed
    SHORTEST_QUEUE = "shortest_queue"

    @classmethod
    def from_str(cls, name: str) -> DispatchMethod:
        """The method called `name`; `ValueError` for an unknown one."""
        return cls(name)


def require_server() -> None:
    """Import the packages of the servers; raises `DependencyError`, naming the extra to install."""
    for package in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        require(package, "serve")


def positive(text: str) -> float:
    """Argument type: a finite number greater than 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, got {text}")
    return value


@dataclass(frozen=True)
class CliArgs:
    """Base of the settings of a program; each field is a flag."""

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Settings from parsed flags; absent flags keep their defaults."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)})

    def check_at_least(self, minimum: int, *names: str) -> None:
        """Raise `ConfigError` when one of the numeric fields `names` is below `minimum`; None is accepted."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}.")


@dataclass(frozen=True)
class ServeArgs(CliArgs):
    """Settings of a server: address, shared token, request limits, shutdown and log."""

    host: str = "localhost"
    port: int = 0
    token_file: Path | None = None
    insecure: bool = False
    max_body_mb: float = 32
    grace_seconds: float = 30
    log_file: str | None = None

    @property
    def max_body(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mb * 2**20)


def add_serve_args(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the flags of `ServeArgs`; `port` is the default port."""
    add = parser.add_argument
    add("--host", default="localhost", help="address to bind; a public one requires a token or --insecure")
    add("--port", type=int, default=port, help="port to bind, 0 for any free one (default %(default)s)")
    add("--token-file", type=Path, help=f"file with the token shared by all services (default: {TOKEN_VARIABLE})")
    add("--insecure", action="store_true", help="bind a public --host without a token")
    add("--max-body-mb", type=positive, default=32, help="largest request body in MiB (default %(default)s)")
    add("--grace-seconds", type=float, default=30, help="shutdown timeout of running requests (default %(default)s)")
    add("--log-file", help="also log to this file in LOGDIR, rotated daily")


@dataclass(frozen=True)
class WorkerArgs(ServeArgs):
    """Settings of a worker: registration, concurrency and request limits."""

    worker_address: str | None = None
    controller_address: str = CONTROLLER_URL
    no_register: bool = False
    model_name: str | None = None
    limit_model_concurrency: int = 5
    queue_limit: int | None = None
    stream_interval: int = 1
    max_new_tokens_limit: int = 1024
    max_images: int = 16

    def __post_init__(self) -> None:
        self.check_at_least(1, "limit_model_concurrency", "max_new_tokens_limit")
        self.check_at_least(0, "queue_limit", "max_images")

    @property
    def queue_size(self) -> int:
        """Requests that may wait."""
        return 8 * self.limit_model_concurrency if self.queue_limit is None else self.queue_limit


def add_worker_args(parser: argparse.ArgumentParser, concurrency: int) -> None:
    """Add the flags of `WorkerArgs`; `concurrency` is the default of `--limit-model-concurrency`."""
    add_serve_args(parser, 21002)
    add = parser.add_argument
    add("--worker-address", "--worker", help="URL that clients reach this worker at (default: localhost)")
    add("--controller-address", "--controller", default=CONTROLLER_URL, help="controller URL (default %(default)s)")
    add("--no-register", action="store_true", help="run without a controller")
    add("--model-name", help="name to serve under (default: the checkpoint's)")
    add("--limit-model-concurrency", type=int, default=concurrency, help="concurrent requests (default %(default)s)")
    add("--queue-limit", type=int, help="waiting requests (default: 8 times --limit-model-concurrency)")
    add("--stream-interval", type=int, default=1, help="tokens per frame after the first (default %(default)s)")
    add("--max-new-tokens-limit", type=int, default=1024, help="longest answer in tokens (default %(default)s)")
    add("--max-images", type=int, default=16, help="images per request (default %(default)s)")
