"""Put an OpenAI-compatible engine (vLLM, SGLang, lmdeploy, llama.cpp, …) behind the controller as a worker.

python -m llava.serve.openai_worker --upstream http://gpu-host:8000/v1 --controller http://localhost:10000 \
    --port 40001 --worker http://localhost:40001 [--upstream-model NAME] [--model-name NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.serve.common.requirements import require_server
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    from llava.serve.common.arguments import add_listen_flags
    from llava.serve.worker.program import add_worker_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_listen_flags(parser, 21002)
    add_worker_flags(parser, concurrency=64)
    add("--upstream", "--sgl-endpoint", required=True, help="the engine's address, up to and with /v1")
    add("--upstream-model", help="its name there (default: the first it lists)")
    add("--upstream-key-file", type=Path, help="file with the key it wants (default: OPENAI_API_KEY)")
    add("--conv-mode", default="vicuna_v1", help="template that clients without messages render (default %(default)s)")
    add("--context-length", type=int, default=32_768, help="told to clients (default %(default)s)")
    add("--text-only", action="store_true", help="the engine takes no pictures")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    require_server()
    args = build_parser().parse_args(argv)
    from llava.conversation import get_template
    from llava.serve.common.arguments import open_socket
    from llava.serve.common.protocol import ModelInfo
    from llava.serve.common.security import read_secrets
    from llava.serve.worker.app import Worker
    from llava.serve.worker.openai_backend import OpenAIBackend
    from llava.serve.worker.program import places, run

    get_template(args.conv_mode)
    limit, queue_limit = places(args)
    info = ModelInfo(
        conv_template=args.conv_mode,
        context_length=args.context_length,
        max_new_tokens=args.max_new_tokens_limit,
        max_images=0 if args.text_only else args.max_images,
    )
    key = next(iter(read_secrets(args.upstream_key_file, "OPENAI_API_KEY")), None)
    sock, token = open_socket(args)
    backend = OpenAIBackend(args.upstream, args.upstream_model, key, info, capacity=limit + queue_limit)
    name = args.model_name or args.upstream_model or "upstream"
    return run(Worker(backend, name, stream_interval=args.stream_interval), sock, token, args)


if __name__ == "__main__":
    sys.exit(main())
