"""`llava check DATA --against BENCHMARK`: what it reads, finds, refuses and writes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import contamination as measured
from benchmarks.contamination import cropped, encode, leaves
from llava.check import main
from llava.eval.run.contents import read_benchmark
from llava.eval.run.questions import SHORT_SUFFIX
from llava.images import expand2square
from tests.data.test_dataset import record
from tests.eval import benchdata
from tests.eval.conftest import write_jsonl
from tests.serve.stubs import until

RARE = "Which of the three sailors on the small wooden boat wears the striped shirt?"
ASK = f"\n{SHORT_SUFFIX}"


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [leaves(rng).resize((160, 120)) for _ in range(6)]


@pytest.fixture
def root(tmp_path: Path, scenes: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training data of four images; the benchmark has copies of 0 and 1, and 4 and 5."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(1)
    for folder in ("images", "bench"):
        (tmp_path / folder).mkdir()
    for index, scene in enumerate(scenes[:4]):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(encode(scene, rng))
    copies = [cropped(scenes[0], rng), expand2square(scenes[1], (122, 116, 104)), *scenes[4:]]
    for index, copy in enumerate(copies):
        (tmp_path / "bench" / f"b{index}.jpg").write_bytes(encode(copy, rng))
    records = [
        record("<image>\nIs there a dog in the image?", image="0.jpg"),
        record("<image>\nIs there a dog in the image?", image="2.jpg"),
        record("<image>\nIs there a dog in the image?", image="3.jpg"),
        record(f"<image>\nI ask: {RARE.lower()}", image="2.jpg"),
        record("<image>\nWhere is this?", image="1.jpg"),
        record("Text only"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    questions = [("Is there a dog in the image?", f"b{index}.jpg") for index in range(4)]
    questions += [(RARE, "b3.jpg"), ("How many oars are there?", "b3.jpg")]
    rows = [{"question_id": index, "text": text + ASK, "image": image} for index, (text, image) in enumerate(questions)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    return tmp_path


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run(root: Path, *argv: str) -> int:
    flags = ["--image_folder", str(root / "images"), "--workers", "1"]
    return int(main([str(root / "data.json"), *flags, *argv]))


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_images_and_questions_are_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A common question is reported with its image only, a rare one always."""
    assert run(root, "--json", "--against", f"{root}/questions.jsonl={root}/bench") == 1
    found = report(capsys)
    pairs = {
        (Path(pair["training_image"]).name, Path(pair["benchmark_image"]).name): pair for pair in found["image_pairs"]
    }
    assert pairs.keys() == {("0.jpg", "b0.jpg"), ("1.jpg", "b1.jpg")}
    assert pairs["0.jpg", "b0.jpg"]["records"] == [f"{root}/data.json:0"]
    assert pairs["0.jpg", "b0.jpg"]["questions"] == ["0"]
    assert [(pair["question_id"], pair["record"], pair["reason"]) for pair in found["question_pairs"]] == [
        ("0", f"{root}/data.json:0", "same image"),
        ("4", f"{root}/data.json:3", "rare text"),
    ]
    (benchmark,) = found["benchmarks"]
    assert (benchmark["images"], benchmark["images_found"], benchmark["questions"]) == (4, 2, 6)
    assert (benchmark["questions_with_image"], benchmark["rare_questions"], benchmark["common_questions"]) == (1, 1, 3)


def test_the_summary_and_the_page_name_the_pairs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "images" / "3.jpg").write_bytes(b"<html>not an image")
    page = root / "page.html"
    argv = ["--html", str(page), "--max-pairs", "1", "--against", f"{root}/questions.jsonl={root}/bench"]
    assert run(root, *argv) == 1
    text = capsys.readouterr().out
    assert "data.json: 6 records with 4 images" in text
    assert "2 of 4 images have near-duplicates (50.0%)" in text and "1 occur with their image" in text
    assert f"images/1.jpg ({root}/data.json:4) = {root}/bench/b1.jpg" in text
    assert "1 training image(s) could not be read" in text and "3.jpg: its content is not" in text
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 2 and "1 more are left out" in html
    assert "<html>not" not in html and "3.jpg: its content" in html
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_exit_status_of_a_clean_and_of_an_incomplete_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b0", "b1"):
        (root / "bench" / f"{name}.jpg").unlink()
    assert run(root, "--against", f"{root}/questions.jsonl={root}/bench") == 1  # a rare question, no image
    assert run(root, "--against", str(root / "bench")) == 0
    assert "0 of 2 images have near-duplicates" in capsys.readouterr().out
    (root / "bench" / "b2.jpg").write_bytes(b"")
    assert run(root, "--against", str(root / "bench")) == 3
    assert "b2.jpg: its content is not" in capsys.readouterr().out
    (root / "data.json").write_text(json.dumps([record("<image>", image="0.jpg"), {"image": "1.jpg"}]))
    (root / "bench" / "b2.jpg").unlink()
    assert run(root, "--against", str(root / "bench")) == 3
    assert f"{root}/data.json:1: conversations is missing or empty" in capsys.readouterr().out


def test_several_benchmarks_and_another_annotation_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "other.json").write_text(
        json.dumps([record("<image>\nWhere is this?", image="b1.jpg"), record("Text only")])
    )
    assert run(root, "--json", "--against", str(root / "bench"), f"{root}/other.json={root}/bench") == 1
    found = report(capsys)
    assert [each["images_found"] for each in found["benchmarks"]] == [2, 1]
    assert [pair["question"] for pair in found["question_pairs"]] == ["Where is this?"]


@pytest.mark.parametrize("name", ["pope", "mmbench", "science_qa"])
def test_a_task_is_read_by_name_folder_and_question_file(name: str, tmp_path: Path) -> None:
    """Labels are not needed."""
    place, _, make = benchdata.BENCHMARKS[name]
    folder = tmp_path / place
    folder.mkdir()
    make(folder)
    for label in ("coco", "problems.json", "pid_splits.json"):
        if (folder / label).is_dir():
            (folder / label).rename(tmp_path / "elsewhere")
        (folder / label).unlink(missing_ok=True)
    question_file = min(file for file in folder.iterdir() if file.is_file())
    found = [read_benchmark(word, None, tmp_path) for word in (name, str(folder), str(question_file))]
    assert len({(len(each.images), tuple(asked.text for asked in each.questions)) for each in found}) == 1
    assert found[0].questions and found[0].images
    assert not any("<image>" in asked.text for asked in found[0].questions)
    source = found[0].load(0)
    assert isinstance(source, bytes) == (name == "mmbench")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against", "popee"], "no such file or folder, nor one of the tasks"),
        (["--against", "{root}"], "neither images nor the questions"),
        (["--against", "{root}/bench=x"], "expected FILE=FOLDER"),
        (["--against", "{root}/bench/b0.jpg"], "expected a task, a folder, or a file"),
        (["--against", "{root}/bench", "--workers", "0"], "--workers must be at least 1"),
        (["--against", "{root}/bench", "--threshold", "2"], "--threshold must be above 0"),
        (["--against", "{root}/bench", "--image_folder", "{root}/none"], "--image_folder must be a folder"),
        (["--against", "pope", "--eval-data", "{root}"], "pope requires .*llava_pope_test.jsonl, which is missing"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    root: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "empty").mkdir()
    argv = [word.replace("{root}", str(root / "empty") if word == "{root}" else str(root)) for word in argv]
    assert run(root, *argv) == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--against BENCHMARK" in capsys.readouterr().out
    assert main(["data.json", "--against", "--help"]) == 0
    assert "exit status is 0 if nothing" in capsys.readouterr().out


def test_worker_processes_and_an_interrupt(root: Path, scenes: list[Image.Image]) -> None:
    """A check in worker processes ends with 130 at Ctrl-C, leaves no process, and the same command finishes it."""
    rng = np.random.default_rng(2)
    names = [f"n{index}.jpg" for index in range(400)]
    for name in names:
        (root / "images" / name).write_bytes(
            encode(Image.effect_noise((320, 240), float(rng.integers(20, 90))).convert("RGB"), rng)
        )
    records = [record("<image>\nWhat?", image=name) for name in [*names, "0.jpg"]]
    (root / "data.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "llava", "check", f"{root}/data.json", "--image_folder", f"{root}/images"]
    command += ["--workers", "2", "--json", "--against", f"{root}/bench"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    seen = ""
    while "image/s" not in seen and (char := process.stderr.read(1)):
        seen += char
    os.killpg(process.pid, signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "the same command continues" in error and "Traceback" not in error
    assert until(lambda: not is_running(process.pid))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert [Path(pair["training_image"]).name for pair in json.loads(done.stdout)["image_pairs"]] == ["0.jpg"]


def test_recall_and_false_alarms_of_a_small_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some hundred seeded images in this process; the program fails below its bounds."""
    settings = {"images": 120, "copied": 24, "workers": 1, "keep": str(tmp_path / "work")}
    monkeypatch.setattr(sys, "argv", ["contamination", json.dumps(settings)])
    assert measured.main() == 0
    assert "recall 100.00%; false alarms 0.000%" in capsys.readouterr().out
