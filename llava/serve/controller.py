"""Register workers and forward requests to them, also through an OpenAI-compatible API below /v1/.

python -m llava.serve.controller --port 10000

Without a token it accepts connections from this machine only, see SECURITY.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import ConfigError
from llava.serve.common.arguments import (
    API_KEYS_VARIABLE,
    DispatchMethod,
    ServeArgs,
    port_flag,
    positive,
    require_server,
)
from llava.utils import flag, guarded

if TYPE_CHECKING:
    from llava.serve.control.registry import WorkerEntry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerArgs(ServeArgs):
    """Settings of the controller."""

    port: int = port_flag(21001)
    dispatch_method: str = flag(
        "shortest_queue", "default %(default)s", choices=[each.value for each in DispatchMethod]
    )
    worker_hosts: Sequence[str] = flag((), "allowed hosts or networks", nargs="+", type=str, metavar="HOST")
    heart_beat_expiration: float = flag(30, "heartbeat timeout in seconds (default %(default)s)", type=positive)
    idle_seconds: float = flag(60, "timeout between bytes of a stream (default %(default)s)", type=positive)
    api_keys_file: Path | None = flag(
        None, f"keys of the API, one per line (default: {API_KEYS_VARIABLE}, comma-separated)", type=Path
    )
    rate_limit: float | None = flag(
        None, "answers per minute of the API, per key, or per address without keys", type=positive
    )
    allowed_origins: Sequence[str] = flag(
        (),
        "origins of web pages whose scripts may use the API, such as https://app.example.org, or *",
        nargs="+",
        type=str,
        metavar="ORIGIN",
    )
    allow_image_urls: bool = flag(False, "fetch https image URLs sent to the API, from public hosts only")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ControllerArgs.add_cli_args(parser)
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    require_server()
    args = ControllerArgs.from_cli_args(build_parser().parse_args(argv))
    from llava.serve.common.middleware import CrossOrigin, Keys, Limits, RequestMiddleware, check_origins
    from llava.serve.common.security import LOOPBACK_HOSTS, AddressRule, read_secrets
    from llava.serve.common.server import open_socket, serve
    from llava.serve.control.app import ControllerService, controller_routes, with_lifespan
    from llava.serve.control.openai_api import OpenAIServing, add_api_routes
    from llava.serve.control.registry import Registry
    from llava.serve.control.worker_client import Timeouts, WorkerClient

    origins = check_origins(args.allowed_origins)
    sock, token = open_socket(args)
    keys = Keys.from_secrets(token, read_secrets(args.api_keys_file, API_KEYS_VARIABLE))
    registry = Registry(args.dispatch_method, expiration=args.heart_beat_expiration)
    public = token is not None or args.insecure
    rule = AddressRule(args.worker_hosts or (() if public else LOOPBACK_HOSTS))
    service = ControllerService(registry, WorkerClient(registry, token, Timeouts(idle=args.idle_seconds)), rule)
    app = with_lifespan(controller_routes(service), service)
    add_api_routes(app, OpenAIServing(service, args.rate_limit, allow_urls=args.allow_image_urls))

    async def drain() -> None:
        await service.drain(args.grace_seconds)

    guarded_app = RequestMiddleware(app, keys, Limits(max_body=args.max_body), service.metrics)
    return serve(CrossOrigin(guarded_app, origins) if origins else guarded_app, sock, drain)


class Controller:
    """Worker registry and dispatch as an object with the published methods; starts no server and no thread.

    Workers whose heartbeats have stopped are removed whenever models or addresses are requested.
    """

    def __init__(self, dispatch_method: str | DispatchMethod = DispatchMethod.SHORTEST_QUEUE) -> None:
        require_server()
        from llava.serve.control.registry import Registry

        self.registry = Registry(dispatch_method)

    @property
    def dispatch_method(self) -> DispatchMethod:
        return self.registry.dispatch

    @property
    def worker_info(self) -> dict[str, WorkerEntry]:
        """Registered workers by address."""
        return {entry.address: entry for entry in self.registry.entries()}

    def register_worker(
        self, worker_name: str, check_heart_beat: bool, worker_status: Mapping[str, object] | None = None
    ) -> bool:
        """Register the worker at address `worker_name`; False when it sends no status and returns none."""
        from llava.serve.common.protocol import WorkerStatus

        status = worker_status or self.get_worker_status(worker_name)
        if not status:
            return False
        self.registry.put(worker_name, check_heart_beat, WorkerStatus.model_validate(status), probed=True)
        return True

    def get_worker_status(self, worker_name: str) -> dict[str, Any] | None:
        """Query a worker; None when it does not respond."""
        from llava.serve.common.client import Client

        try:
            with Client(timeout=5) as client:
                return dict(client.post(worker_name, "/worker_get_status"))
        except ConfigError as error:
            logger.error("%s", error)
            return None

    def remove_worker(self, worker_name: str) -> None:
        self.registry.remove(worker_name)

    def refresh_all_workers(self) -> None:
        """Query all workers again and remove those that do not respond."""
        for address, entry in self.worker_info.items():
            if not self.register_worker(address, entry.check_heart_beat):
                self.remove_worker(address)

    def list_models(self) -> list[str]:
        self.remove_stable_workers_by_expiration()
        return self.registry.models()

    def get_worker_address(self, model_name: str) -> str:
        """Address of a worker selected by the dispatch method; empty when no worker serves the model."""
        self.remove_stable_workers_by_expiration()
        return self.registry.pick(model_name)

    def receive_heart_beat(self, worker_name: str, queue_length: int) -> bool:
        """Record a heartbeat; False for an unknown worker, which must register."""
        return self.registry.heart_beat(worker_name, queue_length)

    def remove_stable_workers_by_expiration(self) -> None:
        self.registry.remove_expired()

    def worker_api_get_status(self) -> dict[str, Any]:
        """Status of all workers together: union of models, sum of speeds and queue lengths."""
        return self.registry.total().model_dump()

    def worker_api_generate_stream(self, params: Mapping[str, object]) -> Iterator[bytes]:
        """Frames of the answer of a selected worker, each with its NUL; one error frame when there is none."""
        from llava.serve.common.client import Client
        from llava.serve.common.protocol import ErrorType, ServeError, encode_frame

        address = self.get_worker_address(str(params["model"]))
        if not address:
            yield encode_frame(ServeError(ErrorType.NOT_FOUND, "No worker serves this model.").frame())
            return
        try:
            with Client() as client:
                for frame in client.stream(address, params):
                    yield encode_frame(frame)
        except ConfigError as error:
            logger.error("%s", error)
            yield encode_frame(ServeError(ErrorType.WORKER_UNAVAILABLE, "The worker cannot be reached.").frame())


if __name__ == "__main__":
    sys.exit(main())
