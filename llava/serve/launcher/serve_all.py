"""Serve models with one command: controller, a worker for each model and the web page, stopped together.

llava serve all --model CHECKPOINT [--model ANOTHER] [--port 7860] [further flags of the worker, such as --device cpu]

Controller and workers take free ports of this machine. The page's address is printed once every model is listed;
the parts' logs go to standard error. Ctrl-C (or SIGTERM) stops all parts, a second one at once; when a part ends by
itself, the others are stopped too, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

from llava.errors import ConfigError
from llava.serve.launcher.child_process import ChildFailed, Part
from llava.utils import guarded, require

_POLL: Final = 0.2
_WEB_FLAGS: Final = ("host", "port", "auth_file", "default_model")
_WEB_SWITCHES: Final = ("insecure", "embed", "moderate", "log_conversations")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava serve all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", "--model-path", action="append", required=True, metavar="CHECKPOINT", help="repeatable")
    add("--grace-seconds", type=float, default=5, help="time for running answers when stopped (default %(default)s)")
    web = parser.add_argument_group("the web page (python -m llava.serve.gradio_web_server --help)")
    web.add_argument("--host", help="default: this machine only")
    web.add_argument("--port", type=int, help="default: the first free one from 7860 up")
    web.add_argument("--auth-file", help="visitors' logins")
    web.add_argument("--default-model", help="the model a new page begins with")
    for switch in _WEB_SWITCHES:
        web.add_argument(f"--{switch.replace('_', '-')}", action="store_true")
    return parser


class Stack:
    """The parts of one service, in the order in which they were started."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.parts: list[Part] = []
        self.asked = 0  # how often someone wanted it to end

    def start(self, name: str, module: str, argv: Sequence[str]) -> Part:
        part = Part(name, module, argv, self.grace + 5)
        self.parts.append(part)
        return part

    def check(self) -> None:
        """Raise `ChildFailed` when a part has ended, `KeyboardInterrupt` when an end was asked for."""
        if self.asked:
            raise KeyboardInterrupt
        for part in self.parts:
            part.check()

    def address_of(self, part: Part) -> str:
        """Where a part listens, once it does."""
        while not part.address:
            self.check()
            time.sleep(_POLL)
        return part.address

    def stop(self) -> None:
        """End all parts by their process ids, the last one first."""
        for part in reversed(self.parts):
            part.stop(self.grace + 5, give_up=lambda: self.asked > 1)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.asked += 1

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)


def listed(address: str) -> list[str]:
    """The models that a web page lists; none while it cannot be asked."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/ready", timeout=10) as reply:
            return list(json.load(reply)["models"])
    except (OSError, ValueError, KeyError):  # not up yet, or 503: nothing is listed yet
        return []


def web_arguments(args: argparse.Namespace) -> list[str]:
    values = [(name, getattr(args, name)) for name in _WEB_FLAGS]
    given = [word for name, value in values if value is not None for word in (_flag(name), str(value))]
    return [*given, *(_flag(name) for name in _WEB_SWITCHES if getattr(args, name))]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_arguments(args: argparse.Namespace, worker_flags: Sequence[str]) -> None:
    """Refuse what would contradict the arrangement; the rest each part checks for itself."""
    taken = {"--port", "--controller", "--worker", "--host"} & {word.partition("=")[0] for word in worker_flags}
    if taken:
        raise ConfigError(
            f"{', '.join(sorted(taken))} of a worker is chosen here; leave it out, or start the parts one by one."
        )
    if len(args.model) > 1 and any(word.startswith("--model-name") for word in worker_flags):
        raise ConfigError("--model-name gives one name, but there are several models; leave it out.")


def run(args: argparse.Namespace, worker_flags: Sequence[str]) -> int:
    stack = Stack(args.grace_seconds)
    grace = ["--grace-seconds", str(args.grace_seconds)]
    with stack.heeding_signals():
        controller = stack.start("controller", "llava.serve.controller", ["--port", "0", *grace])
        link = ["--controller", stack.address_of(controller)]
        for number, model in enumerate(args.model, 1):
            name = "worker" if len(args.model) == 1 else f"worker-{number}"
            flags = ["--model-path", model, "--port", "0", *link, *grace, *worker_flags]
            stack.start(name, "llava.serve.model_worker", flags)
        page = stack.start(
            "web", "llava.serve.gradio_web_server", ["--model-list-mode", "reload", *link, *web_arguments(args)]
        )
        address = stack.address_of(page)
        while len(listed(address)) < len(args.model):
            stack.check()
            time.sleep(_POLL)
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        while True:
            stack.check()
            time.sleep(_POLL)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    for package in ("fastapi", "uvicorn", "httpx", "gradio"):
        if importlib.util.find_spec(package) is None:  # importing them here would only take time
            require(package, "serve")
    args, worker_flags = build_parser().parse_known_args(argv)
    check_arguments(args, worker_flags)
    try:
        return run(args, worker_flags)
    except ChildFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
