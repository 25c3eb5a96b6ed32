"""Run a module that exits with its parent: `python -m llava.serve.launcher.child SECONDS MODULE ARG…`.

Standard input is a pipe whose other end only the parent holds and never writes to. Its end is the parent's end,
however that came, `kill -9` too. The module then gets SIGTERM, and SECONDS to finish before it is ended by force.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time


def end_with_parent(seconds: float, stdin: int = 0) -> None:
    """Wait for the end of standard input, then end this process: first as SIGTERM would, then by force."""
    while os.read(stdin, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os._exit(1)


def main(seconds: str, module: str, *argv: str) -> None:
    # Not a read through sys.stdin: its lock, held by a daemon thread, would disturb the end of the interpreter.
    threading.Thread(target=end_with_parent, args=(float(seconds),), daemon=True).start()
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
