"""Atomic writes, where a file appears under its name only once it is complete; file locks; interrupted JSON Lines."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from llava.errors import ConfigError

Row = Mapping[str, object]  # a JSON object


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

    Missing parent directories are created. The mode follows the umask, whatever the writer made of it. The temporary
    file is removed when the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    try:
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        _set_mode(part, mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def apply_umask(directory: Path, pattern: str = "*") -> None:
    """Give the files of `directory` that match `pattern` the mode of a new file; safetensors writes 0600."""
    probe = _part(directory / "mode")
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in directory.glob(pattern):
        if file.is_file():
            _set_mode(file, mode)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, creating its directory. Raises `ConfigError` if it cannot be written."""
    with write_errors(path), atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; it is renamed to `target` when the block succeeds, else removed.

    The modes of its files follow the umask.

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
        apply_umask(part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Cannot write {target}: {error}. Nothing was kept; free disk space, or choose another output directory."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def drop_partial_line(path: Path) -> None:
    """Truncate a file after its last newline, removing a line whose writing was interrupted."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def lock_file(path: Path) -> TextIO:
    """Lock a file, creating it and its directory, until the returned handle is closed.

    Raises `ConfigError` if another process holds the lock, or the file cannot be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise ConfigError(f"Another process is writing {path}; wait until it ends, or stop it.") from error
    except OSError:  # a file system without locks
        return handle
    return handle


class OrderedWriter:
    """Writes a JSON Lines file in order, whatever order its rows arrive in, and continues an existing file.

    `rows` are those of the file without a partial last line, `known` are other rows by position. If `is_failed` is true
    of a row, the file is rewritten beside the old one and replaces it when complete. `finished` are the positions that
    need no row. `lock` is the handle of `lock_file`, which `close` releases.
    """

    def __init__(
        self,
        path: Path,
        lock: TextIO,
        rows: Sequence[Row],
        is_failed: Callable[[Row], bool],
        known: Mapping[int, Row] | None = None,
    ) -> None:
        self.path, self._lock = path, lock
        own = {at: row for at, row in enumerate(rows) if not is_failed(row)}
        retry = len(own) < len(rows)
        self._next = 0 if retry else len(rows)
        self._pending = {at: row for at, row in ({**(known or {}), **own}).items() if at >= self._next}
        self.finished = frozenset((*own, *self._pending))
        self._copy = path.with_name(f"{path.name}.retry") if retry else None
        with write_errors(path):
            if self._copy is None and path.is_file():  # not a device
                drop_partial_line(path)
            self._file = (self._copy or path).open("w" if retry else "a", encoding="utf-8", newline="\n")
        self._flush()

    def write(self, position: int, row: Row) -> None:
        """Accept the row of a position. It reaches the file once all earlier positions have."""
        self._pending[position] = row
        self._flush()

    def _flush(self) -> None:
        start = self._next
        with write_errors(self.path):
            while self._next in self._pending:
                self._file.write(json.dumps(self._pending.pop(self._next)) + "\n")
                self._next += 1
            if self._next > start:
                self._file.flush()

    def close(self, *, complete: bool) -> None:
        """Close the file; if `complete`, a rewritten file replaces the old one."""
        with self._lock, write_errors(self.path):
            self._file.close()
            if self._copy and complete:
                self._copy.replace(self.path)


def _set_mode(file: Path, mode: int) -> None:
    if stat.S_IMODE(file.stat().st_mode) != mode:  # some network file systems have one mode and refuse to set it
        file.chmod(mode)


def _part(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
