"""Common parts of the asset scripts: directories of installed packages and atomic output directories."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import DependencyError

PRETRAINED = Path("pretrained")
EASY_VQA = Path("playground/data/easy_vqa")


def package_directory(package: str, install: str) -> Path:
    """Directory of an installed package, found without importing it; `install` is the command that installs it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(f"The package {package} is required by the quickstart and not installed; run {install}")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty sibling directory, which is renamed to `target` when the block succeeds."""
    stage = target.with_name(f".{target.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    yield stage
    if target.exists():
        shutil.rmtree(target)
    stage.rename(target)
