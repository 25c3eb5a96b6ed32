"""Serve one checkpoint to many clients, whose requests share batches (spec/serve.md §4).

python -m llava.serve.model_worker --controller http://localhost:10000 --port 40000 \
    --worker http://localhost:40000 --model-path CHECKPOINT [--load-4bit] [--device cpu]
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from llava.utils import guarded, require


def build_parser() -> argparse.ArgumentParser:
    from llava.eval.options import add_model_flags
    from llava.serve.flags import add_listen_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_listen_flags(parser, 21002)
    add("--worker-address", "--worker", help="the address that others reach this worker at (default: localhost)")
    add("--controller-address", "--controller", default="http://localhost:21001")
    add("--no-register", action="store_true", help="no controller: never call one")
    add_model_flags(parser)
    add("--model-name", help="name to serve under (default: from the path)")
    add("--multi-modal", action="store_true", help="obsolete and without effect: the checkpoint says what it is")
    add("--limit-model-concurrency", type=int, default=5, help="requests that share a batch (default %(default)s)")
    add("--queue-limit", type=int, help="requests that may wait for a place (default: 8 for each place)")
    add("--stream-interval", type=int, default=1, help="tokens a frame; the first always goes at once")
    add("--max-new-tokens-limit", type=int, default=1024, help="longest answer (default %(default)s)")
    add("--max-images", type=int, default=16, help="pictures a request (default %(default)s)")
    add("--queue-seconds", type=float, default=120, help="longest wait for the first token (default %(default)s)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    for package in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        require(package, "serve")
    args = build_parser().parse_args(argv)
    from llava.errors import ConfigError
    from llava.mm_utils import get_model_name_from_path
    from llava.serve.flags import open_socket
    from llava.serve.local_model import LocalModel, Settings, loader
    from llava.serve.worker_app import Worker
    from llava.serve.worker_program import run

    if args.limit_model_concurrency < 1 or (args.queue_limit or 0) < 0:
        raise ConfigError("--limit-model-concurrency must be at least 1 and --queue-limit at least 0.")
    limit = args.limit_model_concurrency
    settings = Settings(
        limit=limit,
        queue_limit=8 * limit if args.queue_limit is None else args.queue_limit,
        max_new_tokens=args.max_new_tokens_limit,
        max_images=args.max_images,
        queue_seconds=args.queue_seconds,
    )
    sock, token = open_socket(args)
    if args.multi_modal:
        logging.getLogger(__name__).warning("--multi-modal has no effect: the checkpoint says what it takes.")
    name = args.model_name or get_model_name_from_path(args.model_path)
    worker = Worker(LocalModel(loader(args, name, settings), settings), name, stream_interval=args.stream_interval)
    worker.on_failure = lambda: signal.raise_signal(signal.SIGTERM)
    return run(worker, sock, token, args)


if __name__ == "__main__":
    sys.exit(main())
