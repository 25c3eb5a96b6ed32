"""What the programs of all workers end with: the heartbeats, the application, and serving it until told to stop."""

from __future__ import annotations

import argparse
import socket

from llava.serve.flags import keys_of, limits_of
from llava.serve.heartbeat import HeartBeat
from llava.serve.http_server import port_of, serve
from llava.serve.security import AddressRule
from llava.serve.worker_app import Worker, make_worker_app


def run(worker: Worker, sock: socket.socket, token: str | None, args: argparse.Namespace) -> int:
    """Serve `worker` on `sock`; exit status 1 when its model failed."""
    address = AddressRule().check(args.worker_address or f"http://localhost:{port_of(sock)}")

    async def drain() -> None:
        await worker.drain(args.grace_seconds)

    if not args.no_register:
        worker.heart = HeartBeat(args.controller_address, address, worker.status, token)
    serve(make_worker_app(worker, keys_of(token), limits_of(args)), sock, drain)
    return 1 if worker.backend.state == "failed" else 0
