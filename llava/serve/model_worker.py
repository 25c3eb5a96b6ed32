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

from llava.serve.common.requirements import require_server
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    from llava.engine.arguments import EngineArgs, add_conv_mode_arg
    from llava.serve.common.arguments import add_listen_flags, positive
    from llava.serve.worker.program import add_worker_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_listen_flags(parser, 21002)
    add_worker_flags(parser, concurrency=5)
    EngineArgs.add_cli_args(parser)
    add_conv_mode_arg(parser)
    add("--multi-modal", action="store_true", help="obsolete and without effect: the checkpoint says what it is")
    add("--queue-seconds", type=positive, default=120, help="longest wait for the first token (default %(default)s)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    require_server()
    args = build_parser().parse_args(argv)
    from llava.engine.arguments import EngineArgs
    from llava.mm_utils import get_model_name_from_path
    from llava.serve.common.arguments import open_socket
    from llava.serve.worker.app import Worker
    from llava.serve.worker.local_backend import LocalModel, Settings, loader
    from llava.serve.worker.program import places, run

    limit, queue_limit = places(args)
    settings = Settings(
        limit=limit,
        queue_limit=queue_limit,
        max_new_tokens=args.max_new_tokens_limit,
        max_images=args.max_images,
        queue_seconds=args.queue_seconds,
    )
    sock, token = open_socket(args)
    if args.multi_modal:
        logging.getLogger(__name__).warning("--multi-modal has no effect: the checkpoint says what it takes.")
    name = args.model_name or get_model_name_from_path(args.model_path)
    engine_args = EngineArgs.from_cli_args(args, max_batch_size=limit)
    model = LocalModel(loader(engine_args, name, args.conv_mode, settings), settings)
    worker = Worker(model, name, stream_interval=args.stream_interval)
    worker.on_failure = lambda: signal.raise_signal(signal.SIGTERM)
    return run(worker, sock, token, args)


if __name__ == "__main__":
    sys.exit(main())
