"""Package versions and code commit recorded beside training runs and evaluation answers."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    *("llava", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "numpy", "safetensors"),
    "pillow",
)


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the installed `packages`, read from metadata without importing them."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the source tree this package runs from (`-dirty` if files differ from it), or None without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
