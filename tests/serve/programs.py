"""Serving programs as child processes on free ports, with their logs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.serve.stubs import until

START = 300.0


def alive(pid: int) -> bool:
    """Whether a process is running; False for a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip()[:1] not in ("", "Z")


def children(pid: int) -> list[int]:
    """Process ids of the children."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listing.stdout.split()]


@dataclass
class Program:
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    @property
    def text(self) -> str:
        return "".join(self.log)

    @property
    def url(self) -> str:
        def found() -> str:
            assert self.process.poll() is None, self.text
            match = re.search(r"Listening on http://\S+?:(\d+)", self.text)
            return f"http://127.0.0.1:{match[1]}" if match else ""

        return str(until(found, START))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(START)


@contextmanager
def program(environment: dict[str, str], module: str, *words: str, cwd: Path | None = None) -> Iterator[Program]:
    """`python -m llava.serve.MODULE WORDS` (or a full module name), killed at the end if it is still running."""
    process = subprocess.Popen(
        [sys.executable, "-m", module if "." in module else f"llava.serve.{module}", *words],
        env=environment,
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    running = Program(process)
    reader = threading.Thread(target=running.follow, daemon=True)
    reader.start()
    assert process.stderr is not None
    with ExitStack() as stack:
        stack.callback(process.stderr.close)
        stack.callback(reader.join, 10)
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield running
