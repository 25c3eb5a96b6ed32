"""Register a worker, or a whole controller, with a controller by hand.

python -m llava.serve.register_worker --controller http://localhost:10000 --worker-name http://localhost:40000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import ConfigError
from llava.serve.common.arguments import TOKEN_VARIABLE
from llava.utils import guarded, require


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--controller-address", "--controller", required=True, help="controller URL")
    add("--worker-name", "--worker", required=True, help="worker URL")
    add("--check-heart-beat", action="store_true", help="remove the worker when it sends no heartbeats")
    add("--token-file", type=Path, help=f"file with the shared token (default: {TOKEN_VARIABLE})")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    require("httpx", "serve")
    from llava.serve.common.client import Client

    body = {"worker_name": args.worker_name, "check_heart_beat": args.check_heart_beat, "worker_status": None}
    with Client(args.token_file) as client:
        reply = client.post(args.controller_address, "/register_worker", body)
    if reply is not None and not reply.get("registered", True):
        raise ConfigError(f"The controller cannot reach {args.worker_name}; check that the worker is listening there.")
    print(f"{args.worker_name} is registered.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
