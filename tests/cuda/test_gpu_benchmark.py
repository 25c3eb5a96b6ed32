"""The GPU benchmark on the CPU: all parts at toy sizes, and a runner that survives any failing part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import parts as all_parts
from benchmarks.gpu import runner, timing
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.golden import Comparison, Mismatch
from benchmarks.gpu.report import Line, Report
from benchmarks.gpu.runner import Part, Skip, Watchdog, run_parts

ROOT = Path(__file__).resolve().parents[2]
NAMES = [part.name for part in all_parts.PARTS]
CPU_QUICK = ["--device", "cpu", "--quick"]
LONG = 60.0


def run_program(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *CPU_QUICK, "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


def stored(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    done = run_program(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == ""
    content = stored(tmp_path)
    assert list(content["parts"]) == NAMES and content["versions"]["torch"]
    assert content["parts"].pop("golden")["status"] == "skipped"
    for name, part in content["parts"].items():
        if part["status"] == "skipped":
            assert "not installed" in part["reason"], (name, part)
            continue
        assert part["status"] == "ok" and part["lines"], (name, part)
        assert all(line.get("ok", True) for line in part["lines"]), name
    assert "| what | measured | floor or prediction | fraction |" in done.stdout
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.golden
@pytest.mark.slow
def test_golden_numbers_are_compared(tmp_path: Path, golden_dir: Path) -> None:
    done = run_program(tmp_path, "--golden", str(golden_dir), "--only", "golden")
    assert done.returncode == 0, done.stdout[-3000:]
    lines = stored(tmp_path)["parts"]["golden"]["lines"]
    counts = [line["value"].split(" of ") for line in lines]
    assert len(lines) == 5 and all(right == count for right, count in counts)
    assert sum(int(count) for _, count in counts) >= 50


def test_a_comparison_sees_what_is_beyond_its_tolerance() -> None:
    by = Comparison()
    by.close([1.0, 2.0], [1.0, 2.001], 0.0, 1e-3)
    assert by.worst == pytest.approx(0.5, rel=1e-3)
    summary = {"shape": [2], "index": [1], "value": [2.0], "mean": 1.5, "std": 0.5}
    by.summary(torch.tensor([1.0, 2.0]), summary, 1e-6, 0)
    for wrong in ([1.0, 2.1], [1.0, float("nan")], [1.0]):
        with pytest.raises(Mismatch):
            Comparison().close(wrong, [1.0, 2.0], 1e-3, 0)
    with pytest.raises(Mismatch, match="shape"):
        by.summary(torch.ones(3), summary, 1e-6, 0)
    with pytest.raises(Mismatch):
        by.summary(torch.tensor([1.5, 2.0]), summary, 1e-6, 0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """With parts called a, b and c."""
    (tmp_path / "work").mkdir()
    report = Report(tmp_path / "gpu.json", ["a", "b", "c"])
    return Bench(torch.device("cpu"), report, tmp_path / "work", quick=True, golden=None)


def run(bench: Bench, *works: Callable[[Bench], None], seconds: float = LONG, grace: float = LONG) -> dict[str, Any]:
    """Run `works` as parts a, b, c of `seconds` each; return the stored results."""
    parts = [Part(name, seconds, work) for name, work in zip("abc", works)]
    run_parts(parts, bench, time.monotonic() + LONG, grace)
    parts_stored: dict[str, Any] = stored(bench.report.file.parent)["parts"]
    return parts_stored


def good(bench: Bench) -> None:
    bench.line("speed", 4.0, "ms", floor=3.0)


def failing(bench: Bench) -> None:
    bench.line("before", 1.0, "s")
    raise RuntimeError("no such kernel")


def test_a_part_that_raises_is_recorded_and_the_next_runs(bench: Bench) -> None:
    parts = run(bench, failing, good)
    assert parts["a"]["status"] == "failed" and "RuntimeError: no such kernel" in parts["a"]["error"]
    assert [line["what"] for line in parts["a"]["lines"]] == ["before"]
    assert parts["b"]["status"] == "ok"
    assert parts["b"]["lines"] == [{"what": "speed", "value": 4.0, "unit": "ms", "floor": 3.0, "share": 0.75}]
    assert parts["c"] == {"status": "skipped", "seconds": 0.0, "lines": [], "reason": "not reached"}
    assert not bench.report.good


def test_a_part_that_cannot_run_is_skipped_with_its_reason(bench: Bench) -> None:
    def cannot(bench: Bench) -> None:
        raise Skip("no such package")

    parts = run(bench, cannot)
    assert parts["a"]["status"] == "skipped" and parts["a"]["reason"] == "no such package"
    assert bench.report.good


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_part_over_its_limit_is_stopped_and_the_next_runs(bench: Bench, stubborn: bool) -> None:
    """Also one that guards its measurements against every error."""

    def endless(bench: Bench) -> None:
        while True:
            try:
                time.sleep(0.005)
            except Exception:
                if not stubborn:
                    raise

    parts = run(bench, endless, seconds=0.05)
    assert parts["a"]["status"] == "timeout" and parts["a"]["seconds"] >= 0.05
    assert run(bench, good)["a"]["status"] == "ok"
    assert bench.report.good


def test_a_part_that_hangs_ends_the_run_with_all_known_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that blocks signals cannot be interrupted; only exiting the process ends it."""
    gone = threading.Event()
    left: list[dict[str, Any]] = []

    def leave(bench: Bench) -> None:
        left.append(stored(bench.report.file.parent)["parts"]["a"])
        gone.set()

    def hangs(bench: Bench) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [Watchdog.SIGNAL])  # as in a call that does not return from C
        try:
            good(bench)
            gone.wait()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [Watchdog.SIGNAL])

    monkeypatch.setattr(runner, "_leave", leave)
    run(bench, hangs, seconds=0.05, grace=0.05)
    assert [part["status"] for part in left] == ["timeout"] and left[0]["error"].startswith("hung")
    assert [line["what"] for line in left[0]["lines"]] == ["speed"]


def test_no_interruption_arrives_after_a_part_has_ended() -> None:
    """The limit coincides with the end of the block many times; an interruption outside the guard fails the test."""
    for number in range(400):
        watchdog = Watchdog(0.0005, LONG, lambda: None)
        try:
            with watchdog:
                limit = time.perf_counter() + 0.0004 + number * 5e-7
                while time.perf_counter() < limit:
                    pass
        except runner.PartTimeout:
            watchdog.stop()
        assert sum(range(100)) == 4950


def test_parts_behind_the_deadline_are_dropped(bench: Bench) -> None:
    run_parts([Part("a", LONG, good), Part("b", LONG, good)], bench, time.monotonic() + 1.0)
    parts = stored(bench.report.file.parent)["parts"]
    assert [parts[name]["status"] for name in "ab"] == ["skipped", "skipped"]
    assert parts["a"]["reason"] == parts["b"]["reason"] == "out of time"
    assert bench.report.good


def test_a_part_knows_when_its_time_is_used_up(bench: Bench) -> None:
    def long(bench: Bench) -> None:
        assert bench.in_time("first") and not bench.in_time("second", seconds=LONG)

    parts = run(bench, long, seconds=LONG)
    assert parts["a"]["lines"] == [
        {"what": "second", "value": None, "unit": "", "note": "the part reached its time limit"}
    ]


def test_a_part_that_needs_more_memory_than_is_free_says_how_much(bench: Bench) -> None:
    parts = run(bench, lambda bench: bench.require_memory(2**60, "the model"))
    assert parts["a"]["status"] == "skipped"
    assert parts["a"]["reason"].startswith("the model needs 1073741824.0 GiB, and ")


def test_a_killed_run_leaves_every_line_known_so_far(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
import torch
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Report
from benchmarks.gpu.runner import Part, run_parts
def endless(bench):
    for number in range(3):
        bench.line(f"line {{number}}", float(number), "s")
    print("ready", flush=True)
    while True:
        bench.report.write()
out = Path({str(tmp_path)!r})
bench = Bench(torch.device("cpu"), Report(out / "gpu.json", ["a", "b"]), out, quick=True, golden=None)
run_parts([Part("a", 100, endless), Part("b", 100, endless)], bench, time.monotonic() + 100)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True) as process:
        assert process.stdout is not None
        assert "ready\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGKILL)
    parts = stored(tmp_path)["parts"]
    assert [line["value"] for line in parts["a"]["lines"]] == [0.0, 1.0, 2.0]
    assert parts["a"]["status"] == "failed" and parts["a"]["error"] == "the process ended inside this part"
    assert parts["b"]["status"] == "skipped" and parts["b"]["reason"] == "not reached"


def test_a_write_that_fails_halfway_keeps_the_file_before(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.report.file.read_text(encoding="utf-8")

    def fail(content: Any, file: Any, **options: Any) -> None:
        file.write('{"versions')
        raise OSError("the disk is full")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="full"):
        bench.report.add("a", Line("speed", 1.0, "s"))
    assert bench.report.file.read_text(encoding="utf-8") == before


def wrong(bench: Bench) -> None:
    bench.check("tokens", False, "3 of 4")


@pytest.mark.parametrize(("works", "status"), [((good,), 0), ((good, wrong), 1), ((wrong, good), 1), ((failing,), 1)])
def test_the_exit_status_follows_correctness(
    works: tuple[Callable[[Bench], None], ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(all_parts, "PARTS", [Part(f"part {k}", LONG, work) for k, work in enumerate(works)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert program.main([*CPU_QUICK, "--out", str(tmp_path)]) == status
    out = capsys.readouterr().out
    assert "| what | measured | floor or prediction | fraction |" in out
    assert ("| speed | 4 ms | 3 ms | 75% |" in out) == (good in works)
    assert ("FAIL: tokens: 3 of 4" in out) == (wrong in works)
    assert str(tmp_path / "gpu.json") in out


def test_only_the_parts_asked_for_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(all_parts, "PARTS", [Part("one", LONG, failing), Part("two", LONG, good)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert program.main([*CPU_QUICK, "--out", str(tmp_path), "--only", "two"]) == 0
    parts = stored(tmp_path)["parts"]
    assert parts["one"]["reason"] == "not selected" and parts["two"]["status"] == "ok"
    assert "not selected" not in capsys.readouterr().out


def test_shares_and_what_misses_its_floor(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.begin("a", time.monotonic() + LONG)
    bench.line("step", 5.0, "ms", floor=3.0)
    bench.line("rate", 90.0, "tokens/s", floor=100.0)
    bench.line("launches", 489, predicted=480)
    bench.skip("kernels", "the profiler recorded none")
    bench.finish()
    out = capsys.readouterr().out
    rows = [
        "| step | 5 ms | 3 ms | 60% |",
        "| rate | 90 tokens/s | 100 tokens/s | 90% |",
        "| launches | 489 | 480 |  |",
    ]
    assert all(row in out for row in rows)
    assert "| kernels | not measured: the profiler recorded none |  |  |" in out
    assert out.rstrip().endswith("Below 70% of the floor:\n- step: 60%")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_the_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("No CUDA GPU is visible") and printed.err.count("\n") == 1


def test_golden_data_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([*CPU_QUICK, "--golden", str(tmp_path)]) == 2
    assert "models/cases.json" in capsys.readouterr().err


def test_a_trace_counts_launches_and_waits_but_no_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls, as the profiler reports them."""
    from torch.autograd import DeviceType

    def event(name: str, kind: Any, microseconds: float = 0.0, annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotation)

    gpu, host = DeviceType.CUDA, DeviceType.CPU
    events = [event("gemm", gpu, 40.0), event("Memcpy HtoD", gpu, 4.0), event("step", gpu, 90.0, annotation=True)] * 2
    events += [event("cudaStreamSynchronize", host), event("cudaDeviceSynchronize", host), event("aten::mm", host)]

    @contextlib.contextmanager
    def profile(**options: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    calls: list[int] = []
    found = timing.trace(lambda: calls.append(1), torch.device("cpu"), calls=2)
    assert found is not None and len(calls) == 2
    assert (found.launches, found.waits) == (2.0, 0.5)
    assert found.busy_seconds == pytest.approx(44e-6)
    del events[0], events[2]  # no kernels left
    assert timing.trace(lambda: None, torch.device("cpu")) is None
