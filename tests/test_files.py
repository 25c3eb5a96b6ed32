"""Atomic writes of single files (directories: `tests/model/test_saving.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.files import atomic_write, write_text


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "old")

    def fail() -> None:
        with atomic_write(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.name for file in path.parent.iterdir()] == ["file"] and path.read_text() == "old"


def test_the_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Cannot write .*/file/below: .+\. Free disk space or choose another path\."):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(ConfigError, match="Is a directory"):
        write_text(tmp_path, "x")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
