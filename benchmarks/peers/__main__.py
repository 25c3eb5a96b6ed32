"""Our model against live peers with the same weights: `python -m benchmarks.peers train | generate | serve`.

`train`: training steps, against `LlavaForConditionalGeneration` of transformers 5. `generate`: answers through the
Python API, against vLLM and transformers 5, and one stream of text, against llama.cpp. `serve`: HTTP with 16 clients,
against vLLM.

A peer runs in an environment of its own, made by --install, on the export of `llava export`. Both sides stay alive and
take turns, and a ratio is the median over the pairs of turns. A peer without an environment or a model is skipped with
a message. The exit status is 1 if a target is missed, more than 5 % of the answers differ in float32, a peer fails, or
none could be run.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.process import PeerError

DTYPES = ("float32", "bfloat16")
INFERENCE_PEERS = ("vllm", "transformers", "llama.cpp")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="training steps against transformers 5")
    generate = commands.add_parser("generate", help="answers through the Python API")
    serve = commands.add_parser("serve", help="HTTP with 16 clients")
    for command in (train, generate, serve):
        command.add_argument("--install", action="store_true", help="make the environments first (up to 6 GB each)")
        command.add_argument("--pairs", type=int, default=5, help="pairs of turns (default: %(default)s)")
        command.add_argument("--quick", action="store_true", help="a tiny model: checks that it runs, measures nothing")
    train.add_argument("--environment", type=Path, default=Path("work_dirs/peers/transformers"),
                       help="virtual environment of the peer (default: %(default)s)")  # fmt: skip
    for command in (generate, serve):
        command.add_argument("--environments", type=Path, default=Path("work_dirs/peers"),
                             help="folder with a virtual environment per peer (default: %(default)s)")  # fmt: skip
        command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES,
                             help="vLLM runs eagerly in float32, compiled in bfloat16; llama.cpp has precisions of its "
                             "own (default: both)")  # fmt: skip
    generate.add_argument("--peers", nargs="+", choices=INFERENCE_PEERS, default=INFERENCE_PEERS, help="default: all")
    generate.add_argument("--text-model", type=Path, default=Path("pretrained/smollm2-135m-instruct"),
                          help="LLaMA checkpoint that llama.cpp runs (default: %(default)s)")  # fmt: skip
    generate.add_argument("--shapes", nargs="+", metavar="SHAPE", help='such as POPE or "one image" (default: all)')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        status: int = importlib.import_module(f"benchmarks.peers.{args.command}").run(args)
        return status
    except PeerError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of both sides
    sys.exit(main())
