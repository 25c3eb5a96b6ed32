"""Fixtures: an engine in this process, and the command and environment of child processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llava.engine import Engine, load_engine
from tests.threads import one_thread

__all__ = ["one_thread"]  # a fixture for every test below

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package")
def engine(tiny_dirs: dict[str, Path]) -> Engine:
    return load_engine(tiny_dirs["chat"], device="cpu", max_batch_size=2)


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def chat_command(tiny_dirs: dict[str, Path]) -> list[str]:
    return [sys.executable, "-m", "llava.serve.cli", "--model-path", str(tiny_dirs["chat"]), "--device", "cpu"]
