"""Command-line settings shared by the servers, as dataclasses. Imports no optional package."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from llava.utils import CliArgs, flag, require

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


def port_flag(default: int) -> int:
    return flag(default, "port to bind, 0 for any free one (default %(default)s)")


@dataclass(frozen=True)
class ServeArgs(CliArgs):
    """Settings of a server: address, shared token, request limits, shutdown and log."""

    host: str = flag("localhost", "address to bind; a public one requires a token or --insecure")
    port: int = port_flag(0)
    token_file: Path | None = flag(None, f"file with the shared token (default: {TOKEN_VARIABLE})", type=Path)
    insecure: bool = flag(False, "bind a public --host without a token")
    max_body_mb: float = flag(32, "largest request body in MiB (default %(default)s)", type=positive)
    grace_seconds: float = flag(30, "shutdown timeout of running requests (default %(default)s)", type=float)
    log_file: str | None = flag(None, "also log to this file in LOGDIR, rotated daily")

    @property
    def max_body(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mb * 2**20)


@dataclass(frozen=True)
class WorkerArgs(ServeArgs):
    """Settings of a worker: registration, concurrency and request limits."""

    port: int = port_flag(21002)
    worker_address: str | None = flag(None, "URL that clients reach this worker at (default: localhost)", "--worker")
    controller_address: str = flag(CONTROLLER_URL, "controller URL (default %(default)s)", "--controller")
    no_register: bool = flag(False, "run without a controller")
    model_name: str | None = flag(None, "name to serve under (default: the checkpoint's)")
    limit_model_concurrency: int = flag(5, "concurrent requests (default %(default)s)")
    queue_limit: int | None = flag(None, "waiting requests (default: 8 times --limit-model-concurrency)", type=int)
    stream_interval: int = flag(1, "tokens per frame after the first (default %(default)s)")
    max_new_tokens_limit: int = flag(1024, "longest answer in tokens (default %(default)s)")
    max_images: int = flag(16, "images per request (default %(default)s)")

    def __post_init__(self) -> None:
        self.check_at_least(1, "limit_model_concurrency", "max_new_tokens_limit")
        self.check_at_least(0, "queue_limit", "max_images")

    @property
    def queue_size(self) -> int:
        """Requests that may wait."""
        return 8 * self.limit_model_concurrency if self.queue_limit is None else self.queue_limit
