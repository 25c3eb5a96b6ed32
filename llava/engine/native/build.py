"""Compile a C++ source for this processor and load it, once a machine: `library()`.

The compiled file lies in the user's cache directory under a name made of everything it depends on, so it is never
stale. It is written under another name and renamed, so that processes may build at once. LLAVA_NATIVE=0 turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from llava.files import atomic_write

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SECONDS = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled source; None where it is turned off or cannot be built, which is said once. Linux only so far."""
    compiler = find_compiler()
    if os.environ.get("LLAVA_NATIVE", "1") == "0" or sys.platform != "linux":
        return None
    if compiler is None:
        logger.info("There is no C++ compiler: decoding goes on without the C++ kernel.")
        return None
    try:
        name = f"decode-{fingerprint(compiler)}.so"
        root = cache_directory()
        if root is not None:
            return ready(root / name, compiler)
        with tempfile.TemporaryDirectory() as directory:  # a loaded library does not need its file
            return ready(Path(directory, name), compiler)
    except (OSError, subprocess.SubprocessError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip()
        logger.warning("Decoding goes on without the C++ kernel, which could not be built by %s: %s", compiler, detail)
        return None


def ready(path: Path, compiler: str) -> ctypes.CDLL:
    """The library at `path`, compiled before if it is not there."""
    if not path.exists():
        compile_to(path, compiler)
    return ctypes.CDLL(str(path))


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache_directory() -> Path | None:
    """Ours under $XDG_CACHE_HOME; None where it cannot be written, or where others can write to it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava" / "native"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = root.stat()
    except OSError:
        return None
    safe = state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(root, os.W_OK)
    return root if safe else None


def fingerprint(compiler: str) -> str:
    """Of the source, the flags, the compiler and the processor."""
    asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS)
    about = [SOURCE.read_text(), *FLAGS, asked.stdout, platform.machine(), processor()]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:20]


def processor() -> str:
    """What this processor can do, as the kernel tells it: a cache directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compile_to(path: Path, compiler: str) -> None:
    """Write the library to `path`, whole or not at all. Raises `CalledProcessError` with the compiler's words."""
    with atomic_write(path) as draft:
        command = [compiler, *FLAGS, "-o", str(draft), str(SOURCE)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
