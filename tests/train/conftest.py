"""Data shared by the runs of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.threads import one_thread
from tests.train import runs

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 samples, every fourth of stage 2 without an image."""
    return runs.make_data(tmp_path_factory.mktemp("data") / "mix", text_rows=range(0, 32, 4))
