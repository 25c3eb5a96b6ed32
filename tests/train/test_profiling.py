"""Traces of chosen steps and memory snapshots."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import TrainingError
from llava.train import profiling
from llava.train.train import train
from tests import devices
from tests.cuda.test_training_run import forget_devices
from tests.train import runs

Dirs = dict[str, Path]


def steps_in(trace: Path) -> list[int]:
    """Steps of a trace in order of time; the JSON must hold operations inside the steps and none outside."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = {
        int(event["name"].partition("#")[2]): (event["ts"], event["ts"] + event["dur"])
        for event in events
        if re.fullmatch(r"ProfilerStep#\d+", event.get("name", ""))
    }
    parts = {event["name"] for event in events if event.get("name", "").startswith("micro-batch")}
    assert parts == {"micro-batch 0", "micro-batch 1"}
    products = [event["ts"] for event in events if event.get("name") == "aten::linear"]
    for start, end in ranges.values():
        assert any(start <= time <= end for time in products)
    assert all(any(start <= time <= end for start, end in ranges.values()) for time in products)
    return sorted(ranges, key=lambda step: ranges[step])


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"profile_step_start": 3, "profile_step_end": 5}, [3, 4, 5]),
        ({"profile_step_start": 1}, [1]),
        ({"profile_step_start": 7, "profile_step_end": 20}, [7, 8]),
    ],
)
def test_a_trace_has_the_steps_of_the_window_and_no_other(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, flags: dict[str, int], steps: list[int]
) -> None:
    train(runs.flags(tiny_dirs, small_data, tmp_path, 1, per_device_train_batch_size=2, global_batch_size=4, **flags))
    name = f"rank0_steps{steps[0]}-{steps[-1]}"
    folder = tmp_path / profiling.FOLDER
    assert {file.name for file in folder.iterdir()} == {f"{name}.pt.trace.json.gz", f"{name}.txt"}
    assert steps_in(folder / f"{name}.pt.trace.json.gz") == steps
    table = (folder / f"{name}.txt").read_text()
    assert "aten::addmm" in table and "Self CPU" in table and table.count("\n") < profiling.SLOWEST + 10
    assert len(runs.losses(tmp_path)) == 8


def test_steps_that_do_not_come_are_a_warning(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for first in (9, 30):  # of the first, the step before is the last of the run
        train(runs.flags(tiny_dirs, small_data, tmp_path / str(first), 1, profile_step_start=first))
        assert f"this run had no step {first} to {first}" in caplog.text
        assert not (tmp_path / str(first) / profiling.FOLDER).exists()


def test_nothing_is_added_to_a_run_without_the_flags(tmp_path: Path) -> None:
    args: Any = type("Args", (), {"profile_step_start": None, "memory_snapshot": False})
    assert profiling.profiling_callbacks(args) == []
    with profiling.memory_history(args):
        pass


def test_a_snapshot_on_the_cpu_is_a_warning(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"max_steps": 1, "profile_step_start": 1, "memory_snapshot": True}
    train(runs.flags(tiny_dirs, small_data, tmp_path, 1, **more))
    assert "--memory_snapshot records CUDA memory; on cpu there is nothing to record." in caplog.text
    assert not list(tmp_path.rglob("*.pickle"))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the recorder of torch, which needs a GPU."""
    calls: list[Any] = []

    def dump(filename: str) -> None:
        calls.append(Path(filename).name)
        Path(filename).write_bytes(b"segments")

    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all", **more: calls.append((enabled, more))
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


STARTED = ("all", {"max_entries": profiling.MAX_ENTRIES})
STOPPED = (None, {})


def on_the_cpu() -> torch.profiler.profile:
    """The tracer of the CPU: a simulated GPU has none."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    profiler.prepare_trace()
    return profiler


def test_memory_is_recorded_and_written_after_the_window(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_prepared", lambda device: on_the_cpu())
    forget_devices()
    with devices.simulated_cuda():
        more = {"max_steps": 3, "profile_step_start": 2, "memory_snapshot": True, "use_cpu": None}
        train(runs.flags(tiny_dirs, small_data, tmp_path, 1, **more))
    forget_devices()
    assert recorded == [STARTED, "rank0_steps2-2.memory.pickle", STOPPED]
    assert (tmp_path / "profile" / "rank0_steps2-2.memory.pickle").is_file()


def test_memory_is_written_before_an_out_of_memory_error_is_reported(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.train.llava_trainer import LLaVATrainer

    def full(self: LLaVATrainer, *args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LLaVATrainer, "training_step", full)
    forget_devices()
    with devices.simulated_cuda(), pytest.raises(TrainingError, match="The GPU is out of memory"):
        train(runs.flags(tiny_dirs, small_data, tmp_path, 1, memory_snapshot=True, use_cpu=None))
    forget_devices()
    assert recorded == [STARTED, "rank0_out_of_memory.memory.pickle", STOPPED]
    assert (tmp_path / "profile" / "rank0_out_of_memory.memory.pickle").read_bytes() == b"segments"
