"""Build and load the C++ decode kernel: `library()` compiles it for this processor once per machine.

The compiled file is in the user's cache directory, named by a hash of everything it depends on, so it is never stale.
It is written under a temporary name and renamed, so several processes may build at once. LLAVA_NATIVE=0 disables it.
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
from typing import Any

from llava.files import atomic_write

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode.cpp")
HEADERS = (SOURCE.with_name("amx.h"), SOURCE.with_name("common.h"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TIMEOUT = 120  # seconds


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None if it is disabled or cannot be built, which is logged once. Linux only."""
    compiler = find_compiler()
    if os.environ.get("LLAVA_NATIVE", "1") == "0" or sys.platform != "linux":
        return None
    if compiler is None:
        logger.info("No C++ compiler found; decoding runs without the C++ kernel.")
        return None
    try:
        name = f"decode-{fingerprint(compiler)}.so"
        root = cache_directory()
        if root is not None:
            return load(root / name, compiler)
        with tempfile.TemporaryDirectory() as directory:  # a loaded library does not need its file
            return load(Path(directory, name), compiler)
    except (OSError, subprocess.SubprocessError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip()
        logger.warning("Decoding runs without the C++ kernel, which could not be built by %s: %s", compiler, detail)
        return None


def function(name: str, *arguments: type) -> Any:
    """A function of the library, which must be available; it takes one pointer by default, and returns nothing."""
    found = getattr(library(), name)
    found.argtypes, found.restype = list(arguments) or [ctypes.c_void_p], None
    return found


def has_tiles() -> bool:
    """Whether the library multiplies bfloat16 on the tiles of Intel AMX, and Linux allows it to this process."""
    found = library()
    return found is not None and bool(found.llava_has_tiles())


def load(path: Path, compiler: str) -> ctypes.CDLL:
    """Load the library at `path`, compiling it if the file does not exist."""
    if not path.exists():
        compile_to(path, compiler)
    return ctypes.CDLL(str(path))


def find_compiler() -> str | None:
    """Path of the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the PATH."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache_directory() -> Path | None:
    """`llava/native` under $XDG_CACHE_HOME; None if it is not writable, or writable by other users."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava" / "native"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = root.stat()
    except OSError:
        return None
    safe = state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(root, os.W_OK)
    return root if safe else None


def fingerprint(compiler: str) -> str:
    """Hash of the source, the flags, the compiler version and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT)
    sources = [path.read_text() for path in (SOURCE, *HEADERS)]
    parts = [*sources, *FLAGS, version.stdout, platform.machine(), processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def processor() -> str:
    """Instruction sets of this processor; a cache directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compile_to(path: Path, compiler: str) -> None:
    """Compile the library to `path` atomically. Raises `CalledProcessError` with the compiler's output."""
    with atomic_write(path) as draft:
        command = [compiler, *FLAGS, "-o", str(draft), str(SOURCE)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT)
