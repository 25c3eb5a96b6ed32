"""What the asset scripts share: folders of installed packages, and outputs that appear whole or not at all."""

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
    """The folder of an installed package, found without importing it; `install` is the command that brings it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(f"The package {package}, an asset of the quickstart, is not installed: {install}")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a fresh sibling folder to write into, and rename it to `target` when the block ends without an error.

    An interrupted run therefore leaves no `target` behind, and the next one starts clean.
    """
    stage = target.with_name(f".{target.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    yield stage
    if target.exists():
        shutil.rmtree(target)
    stage.rename(target)
