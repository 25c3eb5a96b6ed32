"""Package versions, code commit, and fingerprints of checkpoints and files, recorded beside runs and answers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    *("llava", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "numpy", "safetensors"),
    "pillow",
)
_CHECKPOINT_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer", "special_tokens")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json")
_SAMPLES, _SAMPLE = 32, 1 << 16  # per weight file; hashing 26 GB would take longer than many benchmarks


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


def checkpoint_fingerprint(path: str | Path) -> str:
    """sha256 of a checkpoint's files: names, sizes, and contents (32 evenly spaced 64 KiB samples of large files).

    A hub name is returned unchanged.
    """
    directory = Path(path)
    if not directory.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and (file.name.startswith(_CHECKPOINT_FILES) or file.name.endswith(_WEIGHT_SUFFIXES)):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for sample in _samples(file):
                digest.update(sample)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """Yield a small file whole, and evenly spaced parts of a large one including the first and the last."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= _SAMPLES * _SAMPLE:
            yield handle.read()
            return
        for index in range(_SAMPLES):
            handle.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
            yield handle.read(_SAMPLE)


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
