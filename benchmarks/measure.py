"""Run a measurement in a separate process, for an accurate peak memory: `measure("module", **settings)`."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO


def measure(module: str, **settings: Any) -> dict[str, float]:
    """Run `python -m module '{settings}'`, which must print one JSON object as its last line."""
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps(settings)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment, timeout=1800
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def settings() -> dict[str, Any]:
    """Settings from the command line of the measured process."""
    values: dict[str, Any] = json.loads(sys.argv[1])
    return values


def open_replies() -> TextIO:
    """The standard output for replies; what libraries print goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB.

    `ru_maxrss` is only the fallback: it survives `fork` and `exec`, so it includes the peak of the parent, which has
    just built the model to measure.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


def resident_mib() -> float:
    """Current resident memory of this process, in MiB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
