"""A chat model in a process of its own, and one in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llava.engine import Engine, load_engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run many times faster on one thread when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def engine(tiny_dirs: dict[str, Path]) -> Engine:
    return load_engine(tiny_dirs["chat"], device="cpu", max_batch_size=2)


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def chat_command(tiny_dirs: dict[str, Path]) -> list[str]:
    return [sys.executable, "-m", "llava.serve.cli", "--model-path", str(tiny_dirs["chat"]), "--device", "cpu"]
