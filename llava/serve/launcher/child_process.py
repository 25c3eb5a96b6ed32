"""A program of the service as a child process: its log passed on, its address read from it, ended by its id."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from llava.errors import LlavaError

_LISTENING: Final = re.compile(r"Listening on (https?://\S+)")
_POLL: Final = 0.05


class ChildFailed(LlavaError):
    """A part of the service ended by itself."""

    code = "SERVE"


class Part:
    """`python -m module argv…`, started at once. Ctrl-C of the terminal does not reach it, `stop` does.

    It does not outlive this process: within `grace` seconds of its end, whatever ended it, the part ends too.
    """

    def __init__(self, name: str, module: str, argv: Sequence[str], grace: float = 5.0) -> None:
        self.name = name
        self.address = ""
        self._last = ""
        apart: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava.parent_process", str(grace), module, *argv],
            stdin=subprocess.PIPE,  # never written to: its end tells the part that we are gone
            stdout=sys.stderr.fileno(),
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            **apart,
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def check(self) -> None:
        """Raise `ChildFailed` if it has ended."""
        status = self.process.poll()
        if status is not None:
            self._reader.join(5)
            reason = f": {self._last}" if self._last else "; its log above says why"
            raise ChildFailed(f"The {self.name} ended with status {status}{reason}")

    def stop(self, seconds: float, give_up: Callable[[], bool]) -> None:
        """Ask it to end; end it by force after `seconds`, or as soon as `give_up` says so."""
        deadline = time.monotonic() + seconds
        if self.process.poll() is None:
            self.process.terminate()
        while self.process.poll() is None:
            if give_up() or time.monotonic() > deadline:
                self.process.kill()
            time.sleep(_POLL)
        self._reader.join(5)
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _pass_on(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for raw in lines:
                line = raw.decode(errors="replace").rstrip()
                match = _LISTENING.search(line)
                if match and not self.address:
                    self.address = match[1]
                if line.strip():
                    self._last = self._last if " | INFO | " in line else line.strip()
                    sys.stderr.write(f"{self.name} | {line}\n")
                    sys.stderr.flush()
