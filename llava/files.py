"""Atomic writes: a file or directory appears under its name only once it is complete."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llava.errors import ConfigError


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` of the block (disk full, permission denied) to a `ConfigError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Free disk space or choose another path."
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it replaces `path` when the block succeeds.

    Missing parent directories are created. The temporary file is removed when the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, creating its directory. Raises `ConfigError` if it cannot be written."""
    with write_errors(path), atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; it is renamed to `target` when the block succeeds, else removed.

    Raises `ConfigError` if `target` exists and is not empty (before the block runs), or cannot be written.
    """
    target = Path(target).resolve()
    part = _part(target)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and is not empty. Choose another output directory, or remove it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Cannot write {target}: {error}. Nothing was kept; free disk space, or choose another output directory."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
