"""What the programs of all workers share: their flags, heartbeats, the application, serving it until told to stop."""

from __future__ import annotations

import argparse
import socket

from llava.errors import ConfigError
from llava.serve.common.arguments import keys_of, limits_of
from llava.serve.common.security import AddressRule
from llava.serve.common.server import port_of, serve
from llava.serve.worker.app import Worker, make_worker_app
from llava.serve.worker.heartbeat import HeartBeat


def add_worker_flags(parser: argparse.ArgumentParser, concurrency: int) -> None:
    """Flags of every kind of worker."""
    add = parser.add_argument
    add("--worker-address", "--worker", help="the address that others reach this worker at (default: localhost)")
    add("--controller-address", "--controller", default="http://localhost:21001")
    add("--no-register", action="store_true", help="no controller: never call one")
    add("--model-name", help="name to serve under (default: the model's own)")
    add("--limit-model-concurrency", type=int, default=concurrency, help="requests at a time (default %(default)s)")
    add("--queue-limit", type=int, help="requests that may wait for a place (default: 8 for each place)")
    add("--stream-interval", type=int, default=1, help="tokens a frame; the first always goes at once")
    add("--max-new-tokens-limit", type=int, default=1024, help="longest answer (default %(default)s)")
    add("--max-images", type=int, default=16, help="pictures a request (default %(default)s)")


def places(args: argparse.Namespace) -> tuple[int, int]:
    """How many requests may run and how many wait."""
    limit = args.limit_model_concurrency
    waiting = 8 * limit if args.queue_limit is None else args.queue_limit
    if limit < 1 or waiting < 0:
        raise ConfigError("--limit-model-concurrency must be at least 1 and --queue-limit at least 0.")
    if args.max_new_tokens_limit < 1 or args.max_images < 0:
        raise ConfigError("--max-new-tokens-limit must be at least 1 and --max-images at least 0.")
    return limit, waiting


def run(worker: Worker, sock: socket.socket, token: str | None, args: argparse.Namespace) -> int:
    """Serve `worker` on `sock`; exit status 1 when its model failed."""
    address = AddressRule().check(args.worker_address or f"http://localhost:{port_of(sock)}")

    async def drain() -> None:
        await worker.drain(args.grace_seconds)

    if not args.no_register:
        worker.heart = HeartBeat(args.controller_address, address, worker.status, token)
    serve(make_worker_app(worker, keys_of(token), limits_of(args)), sock, drain)
    return 1 if worker.backend.state == "failed" else 0
