"""Serve models with one command: controller, one worker per model, and web page, started and stopped together.

llava serve all --model CHECKPOINT [--model ANOTHER] [--port 7860] [--api-port 21001] [further flags of the worker]

Once every model is listed, the URLs of the web page (--port) and of the OpenAI-compatible API (--api-port) are printed
with an example request; the logs go to standard error. The API accepts connections from this machine only. Workers use
free ports; further flags, such as --device cpu, go to them. Ctrl-C (or SIGTERM) stops all services, a second one
immediately. When a service exits, the others are stopped too, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

from llava.errors import ConfigError, LlavaError
from llava.serve.common.arguments import API_KEYS_VARIABLE, TOKEN_VARIABLE
from llava.utils import guarded, require

_LISTENING: Final = re.compile(r"Listening on (https?://\S+)")
_POLL: Final = 0.1
_EXIT_SECONDS: Final = 10  # up to 5 for open connections, and the exit of the process
_API_PORT: Final = 21001
_WEB_FLAGS: Final = ("host", "port", "auth_file", "default_model")
_WEB_SWITCHES: Final = ("insecure", "embed", "moderate", "log_conversations")


class ChildFailed(LlavaError):
    """A service exited by itself."""

    code = "SERVE"


class ChildProcess:
    """A service as a child process, `python -m module argv…`; its log is forwarded and its URL read from it.

    Ctrl-C of the terminal does not reach the child. When this process ends in any way, the child ends within `grace`
    seconds.
    """

    def __init__(self, name: str, module: str, argv: Sequence[str], grace: float = 5.0) -> None:
        self.name = name
        self.address = ""
        self._last_error = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava.parent_process", str(grace), module, *argv],
            stdin=subprocess.PIPE,  # its end tells the child that this process has ended
            stdout=sys.stderr.fileno(),
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows
        )
        self._reader = threading.Thread(target=self._forward_log, daemon=True)
        self._reader.start()

    def check(self) -> None:
        """Raise `ChildFailed` if the process has exited."""
        status = self.process.poll()
        if status is not None:
            self._reader.join(5)
            reason = f": {self._last_error}" if self._last_error else "; see its log above."
            raise ChildFailed(f"The {self.name} exited with status {status}{reason}")

    def stop(self, seconds: float, force: Callable[[], bool]) -> None:
        """Terminate the process; kill it after `seconds`, or as soon as `force` returns true."""
        deadline = time.monotonic() + seconds
        if self.process.poll() is None:
            self.process.terminate()
        while self.process.poll() is None:
            if force() or time.monotonic() > deadline:
                self.process.kill()
            time.sleep(_POLL)
        self._reader.join(5)
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _forward_log(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for raw in lines:
                line = raw.decode(errors="replace").rstrip()
                match = _LISTENING.search(line)
                if match and not self.address:
                    self.address = match[1]
                if line.strip():
                    self._last_error = self._last_error if " | INFO | " in line else line.strip()
                    sys.stderr.write(f"{self.name} | {line}\n")
                    sys.stderr.flush()


class Supervisor:
    """Starts child processes and stops them together."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.children: list[ChildProcess] = []
        self.signals = 0  # received so far

    def start(self, name: str, module: str, argv: Sequence[str]) -> ChildProcess:
        child = ChildProcess(name, module, argv, self.grace + _EXIT_SECONDS)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Raise `ChildFailed` when a child has exited, `KeyboardInterrupt` after a signal."""
        if self.signals:
            raise KeyboardInterrupt
        for child in self.children:
            child.check()

    def address_of(self, child: ChildProcess) -> str:
        """Wait until a child is listening; returns its URL."""
        while not child.address:
            self.check()
            time.sleep(_POLL)
        return child.address

    def stop(self) -> None:
        """Stop all children in reverse order of their start."""
        for child in reversed(self.children):
            child.stop(self.grace + _EXIT_SECONDS, force=lambda: self.signals > 1)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signals += 1

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM within the block; stop all children at its end."""
        previous = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)


def listed_models(address: str) -> list[str]:
    """Models listed by the web page at `address`; empty while the page is not ready."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/ready", timeout=10) as reply:
            return list(json.load(reply)["models"])
    except (OSError, ValueError, KeyError):
        return []


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava serve all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", "--model-path", action="append", required=True, metavar="CHECKPOINT", help="repeatable")
    add("--api-port", type=int, help=f"port of the API (default: the first free one from {_API_PORT})")
    add(
        "--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="origins whose scripts may use the API, or *"
    )
    add("--grace-seconds", type=float, default=5, help="shutdown timeout of running requests (default %(default)s)")
    web = parser.add_argument_group("web page (python -m llava.serve.gradio_web_server --help)")
    web.add_argument("--host", help="address to bind (default: this machine only)")
    web.add_argument("--port", type=int, help="default: the first free port from 7860")
    web.add_argument("--auth-file", help="logins of visitors")
    web.add_argument("--default-model", help="model selected on a new page")
    for switch in _WEB_SWITCHES:
        web.add_argument(_flag(switch), action="store_true")
    return parser


def web_arguments(args: argparse.Namespace) -> list[str]:
    values = [(name, getattr(args, name)) for name in _WEB_FLAGS]
    given = [word for name, value in values if value is not None for word in (_flag(name), str(value))]
    return [*given, *(_flag(name) for name in _WEB_SWITCHES if getattr(args, name))]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def controller_arguments(args: argparse.Namespace) -> list[str]:
    """Flags of the controller; a default port in use is replaced by the next free one, with a note."""
    from llava.serve.common.server import bind_free, port_of

    port = args.api_port
    if port is None:
        with bind_free("127.0.0.1", _API_PORT) as sock:
            port = port_of(sock)
        if port != _API_PORT:
            sys.stderr.write(f"Port {_API_PORT} is in use; the API listens on port {port}.\n")
    return ["--port", str(port), *(["--allowed-origins", *args.allowed_origins] if args.allowed_origins else [])]


def summary(page: str, api: str, model: str) -> str:
    """The URLs of the page and the API, and a request to the API that can be pasted into a shell."""
    key = next((name for name in (API_KEYS_VARIABLE, TOKEN_VARIABLE) if os.environ.get(name)), "")
    header = ' -H "Authorization: Bearer KEY"' if key else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return (
        f"{page}\nAPI: {api}/v1{f' (KEY is a key of {key})' if key else ''}\n"
        f"curl {api}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
    )


def check_arguments(args: argparse.Namespace, worker_flags: Sequence[str]) -> None:
    """Raise `ConfigError` for worker flags that this program sets itself; each service checks the others."""
    reserved = {"--port", "--controller", "--worker", "--host"} & {word.partition("=")[0] for word in worker_flags}
    if reserved:
        raise ConfigError(
            f"{', '.join(sorted(reserved))} of a worker cannot be set here; omit it, or start the services one by one."
        )
    for flag, meaning in (("--model-name", "names a single model"), ("--lora", "belongs to a single base")):
        if len(args.model) > 1 and any(word.partition("=")[0] == flag for word in worker_flags):
            raise ConfigError(f"{flag} {meaning}, but {len(args.model)} were given; omit it.")


def run(args: argparse.Namespace, worker_flags: Sequence[str]) -> int:
    """Start the services, print their URLs, and wait until a signal or a failure."""
    supervisor = Supervisor(args.grace_seconds)
    grace = ["--grace-seconds", str(args.grace_seconds)]
    with supervisor.handle_signals():
        controller = supervisor.start("controller", "llava.serve.controller", [*controller_arguments(args), *grace])
        api = supervisor.address_of(controller)
        link = ["--controller", api]
        for number, model in enumerate(args.model, 1):
            name = "worker" if len(args.model) == 1 else f"worker-{number}"
            flags = ["--model-path", model, "--port", "0", *link, *grace, *worker_flags]
            supervisor.start(name, "llava.serve.model_worker", flags)
        flags = ["--model-list-mode", "reload", *link, *grace, *web_arguments(args)]
        address = supervisor.address_of(supervisor.start("web", "llava.serve.gradio_web_server", flags))
        while len(models := listed_models(address)) < len(args.model):
            supervisor.check()
            time.sleep(_POLL)
        sys.stdout.write(summary(address, api, models[0]))
        sys.stdout.flush()
        while True:
            supervisor.check()
            time.sleep(_POLL)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    for package in ("fastapi", "uvicorn", "httpx", "gradio"):
        if importlib.util.find_spec(package) is None:  # faster than importing it
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
