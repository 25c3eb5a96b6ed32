"""Atomic directories: a failed write raises one `ConfigError` and leaves nothing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llava.errors import ConfigError
from llava.files import atomic_directory
from llava.model import extract_projector
from llava.model.saving import write_weights

WEIGHTS = {"a": torch.zeros(3000)}


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Limit files to `free` bytes, so that writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    said = pytest.raises(ConfigError, match="Cannot write .*File too large.*Nothing was kept")
    with said, full_disk(5000), atomic_directory(tmp_path / "out") as directory:
        write_weights(directory, WEIGHTS.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free", [100, 5000])  # at the configuration, and at the weights
def test_a_program_whose_disk_fills_up(
    tiny_dirs: dict[str, Path], tmp_path: Path, free: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model-path", str(tiny_dirs["chat"]), "--output", str(tmp_path / "out")]
    with full_disk(free):
        assert extract_projector.main(flags) == 2
    assert "Cannot write " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert extract_projector.main(flags) == 0


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_directory_in_use_is_refused_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not empty"), atomic_directory(name):
        pytest.fail("worked for nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["file/below", "a" * 300])
def test_a_path_that_cannot_be_created_is_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot write .*Nothing was kept"), atomic_directory(tmp_path / name):
        pytest.fail("worked for nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
