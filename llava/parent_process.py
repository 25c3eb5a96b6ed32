"""Exit with the parent process, even if it is killed.

Two mechanisms: a shell can hold no pipe, so its children compare parent ids (`exit_with_parent`); on Windows an orphan
keeps its parent's id, so services read a pipe (`python -m llava.parent_process SECONDS MODULE ARG…`).
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from typing import Final

VARIABLE: Final = "LLAVA_EVAL_PARENT"  # set by the parent of evaluation processes: its process id
POLL_SECONDS: Final = 0.5


def exit_with_parent() -> None:
    """Exit this process with status 1 when its parent, whose id is in `LLAVA_EVAL_PARENT`, has ended.

    Does nothing without the variable, or when the process it names runs but is not the direct parent.
    """
    parent = os.environ.get(VARIABLE)
    if parent is None or (parent != str(os.getppid()) and _is_running(int(parent))):
        return

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_running(pid: int) -> bool:
    try:
        if os.name == "posix":  # on Windows, os.kill would end the process
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def exit_at_eof(seconds: float, pipe: int = 0) -> None:
    """Wait until `pipe` is closed, then end this process with SIGTERM, and by force after `seconds`."""
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os._exit(1)


def main(seconds: str, module: str, *argv: str) -> None:
    """Run `module` as a program that exits when standard input, a pipe held by the parent, is closed."""
    # Not a read through sys.stdin: its lock, held by a daemon thread, would hang the interpreter at exit.
    threading.Thread(target=exit_at_eof, args=(float(seconds),), daemon=True).start()
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
