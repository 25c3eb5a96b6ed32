"""Shards: reuse by other shard counts, merging, and errors for incomplete shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.engine.sequence import SamplingParams
from llava.errors import ConfigError, DataError
from llava.eval.run import launch, shards
from llava.eval.run.answers import AnswersWriter
from llava.eval.run.manifest import check_resume, manifest_path
from llava.eval.run.questions import Question
from llava.eval.run.runner import Answer, RunSettings, run
from llava.eval.run.shards import merge as merge_parts
from llava.eval.run.shards import shard_path, shards_folder
from llava.files import lock_file
from llava.parent_process import exit_with_parent
from tests.eval.conftest import question_rows, read_jsonl, write_jsonl
from tests.test_package import ROOT

KILLS = int(os.environ.get("LLAVA_KILLS", "1"))
QUESTIONS = [Question(number // 2, f"question {number}", (f"{number % 3}.png",)) for number in range(13)]


class Echo:
    """Echoes questions in random order, stops after `last` answers, and records the questions in `asked`."""

    batch_size = 4

    def __init__(self, last: int | None = None, broken: Iterable[int] = (), seed: int = 0) -> None:
        self.last, self.broken, self.random = last, frozenset(broken), random.Random(seed)
        self.asked: list[Any] = []

    def identity(self, settings: RunSettings) -> dict[str, object]:
        return {"checkpoint": settings.model_path}

    def answer(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Answer]:
        positions = list(order)
        self.random.shuffle(positions)
        for position in positions:
            if self.last is not None and len(self.asked) >= self.last:
                raise KeyboardInterrupt
            self.asked.append(questions[position].key)
            failed = int(questions[position].prompt.split()[1]) in self.broken
            yield position, "" if failed else f"echo {questions[position].prompt}", "broken" if failed else None


SETTINGS = RunSettings("model", "model", "", SamplingParams(4))


def part(folder: Path, index: int, count: int, model: Echo, **changes: Any) -> None:
    chunk = dataclasses.replace(SETTINGS, chunk=(index, count), **changes)
    run(model, QUESTIONS, shard_path(folder, index, count), chunk)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    run(Echo(), QUESTIONS, path, SETTINGS)
    return path.read_bytes()


def paths(folder: Path, count: int) -> list[Path]:
    return [shard_path(folder, index, count) for index in range(count)]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 6)), max_size=5),
    tear=st.integers(0, 40), count=st.integers(1, 15), seed=st.integers(0, 99),
)  # fmt: skip
def test_interrupted_runs_with_any_shard_counts_end_in_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, steps: list[tuple[int, int, int]], tear: int, count: int,
    seed: int,
) -> None:  # fmt: skip
    """Runs with other shard counts are interrupted and their files truncated; then all shards run to the end."""
    target = tmp_path_factory.mktemp("history") / "answers.jsonl"
    folder = shards_folder(target)
    asked: list[Any] = []
    for others, index, last in steps:
        model = Echo(last, seed=seed)
        path = target if others == 1 else shard_path(folder, index % others, others)
        try:
            run(model, QUESTIONS, path, dataclasses.replace(SETTINGS, chunk=(index % others, others)))
        except KeyboardInterrupt:
            os.truncate(path, max(0, path.stat().st_size - tear))
    for index in range(count):
        model = Echo(seed=seed)
        part(folder, index, count, model)
        asked += model.asked
    assert len(asked) == len(set(asked))
    assert merge_parts(paths(folder, count), target) == 13
    assert target.read_bytes() == whole
    again = Echo()
    assert run(again, QUESTIONS, target, SETTINGS).asked == 0 and again.asked == []


def test_other_shards_reuse_answers(tmp_path: Path, whole: bytes) -> None:
    target = tmp_path / "answers.jsonl"
    part(shards_folder(target), 1, 2, Echo())
    model = Echo()
    assert run(model, QUESTIONS, target, SETTINGS).reused == 6 and len(model.asked) == 7
    assert target.read_bytes() == whole
    model = Echo()
    part(shards_folder(target), 0, 3, model)
    assert model.asked == []
    model = Echo()
    part(shards_folder(target), 1, 3, model, overwrite=True)
    assert len(model.asked) == 5


def test_answers_of_other_settings_are_not_reused(tmp_path: Path) -> None:
    part(tmp_path, 0, 2, Echo())
    model = Echo()
    part(tmp_path, 0, 3, model, model_path="another")
    assert len(model.asked) == 5


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    for index in range(3):
        part(tmp_path, index, 3, Echo())
    return paths(tmp_path, 3)


def join(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of merging, which must write nothing."""
    assert shards.main(["--answers-dir", str(parts[0].parent), "--num-chunks", "3"]) == 2
    assert not (parts[0].parent / "merge.jsonl").exists()
    return capsys.readouterr().err


def test_shards_are_merged_in_question_order(parts: list[Path], whole: bytes, tmp_path: Path) -> None:
    assert shards.main(["--answers-dir", str(tmp_path), "--num-chunks", "3"]) == 0
    assert (tmp_path / "merge.jsonl").read_bytes() == whole
    manifest = json.loads(manifest_path(tmp_path / "merge.jsonl").read_text())
    assert manifest["status"] == "complete" and manifest["questions"] == 13 and len(manifest["shards"]) == 3
    assert shards.main(["--answers-dir", str(tmp_path), "--num-chunks", "0"]) == 2


def test_the_engines_statistics_of_all_shards_are_added(parts: list[Path], tmp_path: Path) -> None:
    def merged() -> Any:
        merge_parts(parts, tmp_path / "all.jsonl")
        return json.loads(manifest_path(tmp_path / "all.jsonl").read_text())["engine"]

    assert merged() is None  # of a model without an engine
    for number, path in enumerate(parts):
        content = json.loads(manifest_path(path).read_text())
        content["engine"] = {"requests": number, "seconds": {"decode": 0.5, "idle": number}}
        manifest_path(path).write_text(json.dumps(content))
    assert merged() == {"requests": 3, "seconds": {"decode": 1.5, "idle": 3}}


def test_a_missing_shard_is_reported(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    parts[1].unlink()
    assert "Shard 1 of 3" in join(parts, capsys)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_missing_answer_is_reported(parts: list[Path], number: int, capsys: pytest.CaptureFixture[str]) -> None:
    lines = parts[1].read_bytes().splitlines(keepends=True)
    del lines[number]
    parts[1].write_bytes(b"".join(lines))
    assert "Shard 1 of 3" in (error := join(parts, capsys)) and "has 4 of 5 answers" in error


def test_a_repeated_answer_is_reported(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_jsonl(parts[2])
    write_jsonl(parts[2], [rows[0], *rows[:-1]])
    assert "Shard 2 of 3" in (error := join(parts, capsys)) and "each of its questions once and in order" in error


def test_a_failed_answer_is_reported(tmp_path: Path, parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    part(tmp_path, 0, 3, Echo(broken=[3]), overwrite=True)
    assert "Shard 0 of 3" in (error := join(parts, capsys)) and "1 failed answers, the first to question 1" in error
    part(tmp_path, 0, 3, Echo())
    assert merge_parts(parts, tmp_path / "merge.jsonl") == 13


def test_shards_of_different_runs_are_not_merged(tmp_path: Path, parts: list[Path]) -> None:
    part(tmp_path, 2, 3, Echo(), model_path="another", overwrite=True)
    with pytest.raises(DataError, match="other settings"):
        merge_parts(parts, tmp_path / "merge.jsonl")
    with pytest.raises(DataError, match=r"Shard 0 of 2 .* was written as shard \[0, 3\]"):
        merge_parts(parts[:2], tmp_path / "merge.jsonl")


def test_an_answers_file_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    held = lock_file(path)
    with pytest.raises(ConfigError, match="Another process is writing"):
        AnswersWriter(path, QUESTIONS)
    with pytest.raises(ConfigError, match="Another process is writing"):
        check_resume(path, {}, resume=False, overwrite=True)
    assert path.is_file()
    held.close()
    AnswersWriter(path, QUESTIONS).close(complete=False)


def test_visible_gpus_and_ranks() -> None:
    assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": "0, 3,"}) == ["0", "3"] and launch.visible_gpus({}) == []
    assert launch.torchrun_rank({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)
    assert launch.torchrun_rank({"RANK": "0", "WORLD_SIZE": "1"}) is None and launch.torchrun_rank({}) is None
    with pytest.raises(ConfigError, match="must be integers"):
        launch.torchrun_rank({"RANK": "x", "WORLD_SIZE": "4"})


CHILD = """
import os, sys
index = sys.argv[sys.argv.index("--chunk-idx") + 1]
open(os.path.join(sys.argv[1], index), "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
sys.exit(3 if index in sys.argv[2] else 0)
"""


def test_every_shard_has_a_gpu_and_failed_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child_of_launch.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    launch.run_shards("child_of_launch", [str(tmp_path), "none"], 3)
    assert [(tmp_path / str(index)).read_text() for index in range(3)] == ["4", "7", "4"]
    with pytest.raises(DataError, match=r"2 of 3 shards failed, see above: 0 \(status 3\), 2 \(status 3\)"):
        launch.run_shards("child_of_launch", [str(tmp_path), "02"], 3)


ORPHAN = (
    "import time; from llava.parent_process import exit_with_parent; "
    "exit_with_parent(); print(1, flush=True); time.sleep(99)"
)


def test_a_child_ends_with_its_parent() -> None:
    """The parent starts a child and is killed."""
    code = f"import os, subprocess, sys; os.environ['LLAVA_EVAL_PARENT'] = str(os.getpid()); " \
           f"child = subprocess.Popen([sys.executable, '-c', {ORPHAN!r}], stdout=subprocess.PIPE); " \
           "child.stdout.readline(); print(child.pid, flush=True); os.kill(os.getpid(), 9)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    child = int(done.stdout)
    deadline = time.monotonic() + 60
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_indirect_child_keeps_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EVAL_PARENT", str(os.getpid()))  # running, and not the parent of this process
    threads = threading.active_count()
    exit_with_parent()
    assert threading.active_count() == threads


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture
def gqa(tmp_path: Path, images: Path) -> Path:
    """A data folder of GQA with forty questions."""
    root = tmp_path / "gqa"
    rows = [{**row, "question_id": str(n)} for n, row in enumerate(question_rows(40))]
    (root / "data").mkdir(parents=True)
    (root / "data" / "images").symlink_to(images)
    write_jsonl(root / "llava_gqa_testdev_balanced.jsonl", rows)
    labels = {row["question_id"]: {"answer": "yes"} for row in rows}
    (root / "data" / "testdev_balanced_questions.json").write_text(json.dumps(labels))
    return root


def kill_when(process: subprocess.Popen[bytes], folder: Path, goal: int) -> int:
    """Kill a run once its files have `goal` answers, unless it ends before; return the number of answers."""

    def written() -> int:  # in the shards, and again in the merged file
        return min(40, sum(file.read_bytes().count(b"\n") for file in folder.rglob("*.jsonl")))

    deadline = time.monotonic() + 600
    while process.poll() is None and written() < goal:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return written()


@pytest.mark.slow
@pytest.mark.timeout(600 * KILLS)
def test_killed_runs_resumed_with_another_count(tiny_dirs: dict[str, Path], gqa: Path, tmp_path: Path) -> None:
    """One process completes a killed run of two, and torchrun's processes reuse its answers.

    More rounds with other counts: `LLAVA_KILLS=20 python -m pytest -s -k killed_runs tests/eval`.
    """
    flags = ["-m", "llava.eval.main", "--tasks", "gqa", "--model-path", str(tiny_dirs["chat"]), "--device", "cpu"]
    flags += ["--max-new-tokens", "20", "--batch-size", "2", "--data-root", str(gqa), "--output-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)

    def start(output: str, *more: str, program: Sequence[str] = (sys.executable,)) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*program, *flags, str(tmp_path / output), *more], cwd=ROOT, env=environment, start_new_session=True
        )

    assert start("whole").wait(500) == 0
    whole = (tmp_path / "whole" / "gqa" / "answers.jsonl").read_bytes()
    choices = random.Random(7)
    plan = [(2, 1, 8), *((*choices.sample([1, 2, 3, 4], 2), choices.randrange(40)) for _ in range(KILLS - 1))]
    for number, (first, second, goal) in enumerate(plan):
        output = f"killed {number}"
        before = kill_when(start(output, "--num-chunks", str(first)), tmp_path / output, goal)
        answers = tmp_path / output / "gqa" / "answers.jsonl"
        status = start(output, "--num-chunks", str(second)).wait(500)
        asked = json.loads(manifest_path(answers).read_text())["asked"]
        print(f"{number}: {first} processes killed at {before} of 40 answers, {second} went on with {asked}: {status}")
        assert status == 0 and answers.read_bytes() == whole and asked <= 40 - before
        assert number or 0 < before < 40
    answers = tmp_path / "killed 0" / "gqa" / "answers.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    answers.unlink()
    assert start("killed 0", program=torchrun).wait(500) == 0
    assert answers.read_bytes() == whole
