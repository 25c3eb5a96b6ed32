"""Keep the list of workers and pass requests on: `python -m llava.serve.controller --port 10000` (spec/serve.md §3).

It also speaks OpenAI's protocol below /v1/. Without a token it listens on this machine only, see SECURITY.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.serve.common.requirements import require_server
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    from llava.serve.common.arguments import add_listen_flags, positive
    from llava.serve.common.security import API_KEYS_VARIABLE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_listen_flags(parser, 21001)
    add("--dispatch-method", choices=("lottery", "shortest_queue"), default="shortest_queue")
    add("--worker-hosts", nargs="+", default=[], metavar="HOST", help="hosts or networks that workers may be on")
    add("--heart-beat-expiration", type=positive, default=30, help="seconds of silence (default %(default)s)")
    add("--idle-seconds", type=positive, default=60, help="longest silence within a stream (default %(default)s)")
    add("--api-keys-file", type=Path, help=f"keys for /v1/, one a line (default: {API_KEYS_VARIABLE}, with commas)")
    add("--rate-limit", type=positive, help="requests a minute for each key (without keys: each address) below /v1/")
    add("--allow-image-urls", action="store_true", help="fetch https image addresses sent to /v1/, public hosts only")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    require_server()
    args = build_parser().parse_args(argv)
    from llava.serve.common.arguments import keys_of, limits_of, open_socket
    from llava.serve.common.middleware import guard
    from llava.serve.common.security import API_KEYS_VARIABLE, LOOPBACK_HOSTS, AddressRule, read_secrets
    from llava.serve.common.server import serve
    from llava.serve.control.app import Controller, controller_routes, with_lifespan
    from llava.serve.control.openai_api import ApiServer, add_api_routes
    from llava.serve.control.registry import Registry
    from llava.serve.control.worker_client import Times, WorkerClient

    sock, token = open_socket(args)
    api_keys = read_secrets(args.api_keys_file, API_KEYS_VARIABLE)
    registry = Registry(args.dispatch_method, expiration=args.heart_beat_expiration)
    open_to_others = token is not None or args.insecure
    rule = AddressRule(args.worker_hosts or (() if open_to_others else LOOPBACK_HOSTS))
    client = WorkerClient(registry, token, Times(idle=args.idle_seconds))
    controller = Controller(registry, client, rule)
    app = with_lifespan(controller_routes(controller), controller)
    add_api_routes(app, ApiServer(controller, args.rate_limit, allow_urls=args.allow_image_urls))

    async def drain() -> None:
        await controller.drain(args.grace_seconds)

    return serve(guard(app, keys_of(token, api_keys), limits_of(args), controller.metrics), sock, drain)


if __name__ == "__main__":
    sys.exit(main())
