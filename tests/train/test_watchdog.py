"""Data faults found during training end the run; hanging steps end with the stacks of all ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llava.data import dataset_scan
from llava.errors import DataError
from llava.train import watchdog
from llava.train.train import train
from llava.train.watchdog import Watchdog
from tests.train import runs

HANG = """
import sys, time
from llava.data.dataset import LazySupervisedDataset
from llava.train import watchdog
from llava.train.train import main

watchdog.GRACE = 3.0
load, drawn = LazySupervisedDataset.__getitem__, []

def hang_here(self, index):
    drawn.append(index)
    if len(drawn) == 3 and "RANK_OF_HANG" == __import__("os").environ["RANK"]:
        time.sleep(1000)
    return load(self, index)

LazySupervisedDataset.__getitem__ = hang_here
sys.exit(main())
"""


def test_a_fault_found_by_the_background_scan_ends_the_run(
    tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bad record is never sampled: only the background scan can find it."""
    monkeypatch.setattr(dataset_scan, "INLINE_RECORDS", 0)
    records = json.loads((small_data / "finetune.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([*records * 20, {"conversations": []}]))
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "run", 2, data_path=tmp_path / "data.json")
    with pytest.raises(DataError, match="record 640: conversations is missing"):
        train(argv)


def test_the_watchdog_fires_only_without_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.05)
    left: list[int] = []
    dog = Watchdog(0.4, 3, left.append)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)  # it would end us
    dog.on_train_begin(None, None, None)
    begin = time.monotonic()
    while time.monotonic() - begin < 0.8:
        dog.on_step_end(None, None, None)
        time.sleep(0.01)
    while not left:
        assert time.monotonic() - begin < 60
        time.sleep(0.01)
    dog.stop()
    assert left == [watchdog.STATUS]


@pytest.mark.slow
def test_hanging_ranks_dump_their_stacks_and_exit(tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG.replace("RANK_OF_HANG", "1"))
    more: dict[str, Any] = {"per_device_train_batch_size": 1, "step_timeout": 20}
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "run", 2, **more)
    process = runs.start(argv, tmp_path / "log", ranks=2, program=[str(tmp_path / "hang.py")])
    assert process.wait(runs.DEADLINE) != 0
    output = (tmp_path / "log").read_text(errors="replace")
    assert "Rank 0: no training event" in output and "Rank 1: no training event" in output
    assert "hang_here" in output and "rerun the same command to resume" in output
