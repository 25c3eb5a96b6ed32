"""What is built for PyPI, without network and without isolation: contents and metadata of wheel and sdist."""

from __future__ import annotations

import email.message
import email.policy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import llava
from tests.test_package import ROOT, plain_environment

BUILD = "import sys; from setuptools import build_meta as b; _, out = sys.argv; b.build_sdist(out); b.build_wheel(out)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist and the wheel of a copy of the tree."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "llava", copy / "llava", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, env=plain_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (file,) = built.glob("*.whl")
    assert file.name == f"llava-{llava.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(file)


def metadata(wheel: zipfile.ZipFile) -> email.message.EmailMessage:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    parsed = message_from_bytes(wheel.read(name), policy=email.policy.default)
    assert isinstance(parsed, email.message.EmailMessage)
    return parsed


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llava").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {f"llava/engine/native/{name}" for name in ("decode.cpp", "amx.h", "common.h")} <= set(files)
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files


def test_the_sdist_builds_the_same_package(built: Path, wheel: zipfile.ZipFile) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_metadata(wheel: zipfile.ZipFile) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["Version"], found["License-Expression"]) == ("llava", llava.__version__, "Apache-2.0")
    assert found["Description-Content-Type"] == "text/markdown"
    assert {"train", "eval", "serve", "quant", "export"} <= set(found.get_all("Provides-Extra", []))
    assert "transformers==4.36.2" in found.get_all("Requires-Dist", [])
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(entry).decode().split("\n")[:2] == ["[console_scripts]", "llava = llava.cli:main"]
