"""Serve an OpenAI-compatible engine (vLLM, SGLang, lmdeploy, llama.cpp, …) behind the controller.

python -m llava.serve.openai_worker --upstream http://gpu-host:8000/v1 --controller http://localhost:10000 \
    --port 40001 --worker http://localhost:40001 [--upstream-model NAME] [--model-name NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.conversation import get_template
from llava.serve.common.arguments import WorkerArgs, require_server
from llava.utils import flag, guarded


@dataclass(frozen=True)
class OpenAIWorkerArgs(WorkerArgs):
    """Settings of an OpenAI worker."""

    limit_model_concurrency: int = flag(64, "concurrent requests (default %(default)s)")
    upstream: str = flag("", "base URL of the engine's API, including /v1", "--sgl-endpoint", required=True)
    upstream_model: str | None = flag(None, "model name at the engine (default: the first it lists)")
    upstream_key_file: Path | None = flag(None, "file with the engine's API key (default: OPENAI_API_KEY)", type=Path)
    conv_mode: str = flag("vicuna_v1", "template of clients that send a prompt only (default %(default)s)")
    context_length: int = flag(32_768, "context length reported to clients (default %(default)s)")
    text_only: bool = flag(False, "the engine accepts no images")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    OpenAIWorkerArgs.add_cli_args(parser)
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    require_server()
    args = OpenAIWorkerArgs.from_cli_args(build_parser().parse_args(argv))
    from llava.serve.common.protocol import ModelInfo
    from llava.serve.common.security import read_secrets
    from llava.serve.common.server import open_socket
    from llava.serve.worker.app import Worker, run_worker
    from llava.serve.worker.openai_backend import OpenAIBackend

    get_template(args.conv_mode)
    info = ModelInfo(
        conv_template=args.conv_mode,
        context_length=args.context_length,
        max_new_tokens=args.max_new_tokens_limit,
        max_images=0 if args.text_only else args.max_images,
    )
    key = next(iter(read_secrets(args.upstream_key_file, "OPENAI_API_KEY")), None)
    sock, token = open_socket(args)
    capacity = args.limit_model_concurrency + args.queue_size
    backend = OpenAIBackend(args.upstream, args.upstream_model, key, info, capacity=capacity)
    name = args.model_name or args.upstream_model or "upstream"
    return run_worker(Worker(backend, name, stream_interval=args.stream_interval), sock, token, args)


if __name__ == "__main__":
    sys.exit(main())
