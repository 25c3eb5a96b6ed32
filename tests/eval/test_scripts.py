"""Evaluation scripts end to end on the tiny model: outputs, shards, and error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.engine import Engine
from tests.eval.benchdata import make_everything
from tests.eval.fake_server import FakeServer
from tests.eval.in_process import python_in_process
from tests.test_package import ROOT

FOLDER = "scripts_internvl/eval"
SCRIPTS = sorted(path.stem for path in (ROOT / FOLDER).glob("[!_]*.sh"))
LLAVA = sorted(path.stem for path in (ROOT / "scripts" / "v1_5" / "eval").glob("[!_]*.sh"))
ONE = ["--device", "cpu", "--max-new-tokens", "2"]
# last line of each script, and a file that it writes below the folder of all benchmarks
OUTPUTS = {
    "gqa": ("all                7", "gqa/answers/llava_gqa_testdev_balanced/NAME/testdev_balanced_predictions.json"),
    "llavabench": ("all 75.0", "llava-bench-in-the-wild/reviews/NAME.jsonl"),
    "llavabench_coco": ("all 75.0", "../coco2014_val_qa_eval/reviews/NAME.jsonl"),
    "mmbench": ("Circular accuracy", "mmbench/answers_upload/mmbench_dev_20230712/NAME.xlsx"),
    "mmbench_cn": ("Circular accuracy", "mmbench_cn/answers_upload/mmbench_dev_cn_20231003/NAME.xlsx"),
    "mme": ("Perception", "MME/eval_tool/answers/NAME/OCR.txt"),
    "mmvet": ("convert_mmvet", "mm-vet/results/NAME.json"),
    "pope": ("Mean F1", "pope/answers/NAME.jsonl"),
    "seed": ("Total accuracy", "seed_bench/answers_upload/NAME.jsonl"),
    "sqa": ("IMG-Accuracy", "scienceqa/answers/NAME_result.json"),
    "textvqa": ("Samples: 3", "textvqa/answers/NAME.jsonl"),
    "vizwiz": ("answers_upload", "vizwiz/answers_upload/NAME.json"),
    "vqav2": ("answers_upload", "vqav2/answers_upload/llava_vqav2_mscoco_test-dev2015/NAME.json"),
}


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    unset = ("CUDA_VISIBLE_DEVICES", "CHECKPOINT", "LLAVA_DRY_RUN")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHON": sys.executable, **variables}
    command = ["sh", f"{name}.sh" if "/" in name else f"{FOLDER}/{name}.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("scripts") / "eval")


@pytest.fixture
def python(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fast `PYTHON` for scripts: this process with its loaded model."""
    monkeypatch.setattr("llava.engine.engine.load_engine", lambda *arguments, **options: engine)
    monkeypatch.chdir(ROOT)
    with python_in_process(tmp_path) as path:
        yield str(path)


def test_scripts_are_complete() -> None:
    assert set(SCRIPTS) == set(OUTPUTS)
    assert set(LLAVA) == set(OUTPUTS) - {"llavabench_coco"}


@pytest.mark.parametrize("name", OUTPUTS)
def test_scripts_run_end_to_end(
    name: str, python: str, tiny_dirs: dict[str, Path], data: Path, judge: FakeServer
) -> None:
    judge.replies = [(200, "8 6\nThe second is shorter.")]
    done = script(name, f"{tiny_dirs['chat']}/", *ONE, EVAL_DATA=str(data), PYTHON=python)
    assert done.returncode == 0, done.stderr
    expected, output = OUTPUTS[name]
    assert expected in done.stdout
    assert (data / output.replace("NAME", tiny_dirs["chat"].name)).is_file()


@pytest.mark.slow
def test_a_script_in_separate_processes(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    data = make_everything(tmp_path / "eval")
    done = script("pope", f"{tiny_dirs['chat']}/", *ONE, EVAL_DATA=str(data), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "Mean F1" in done.stdout


@pytest.mark.parametrize(("name", "merged"), [("gqa", "gqa/answers/llava_gqa_testdev_balanced/NAME/merge.jsonl"),
                                              ("textvqa", "textvqa/answers/NAME.jsonl")])  # fmt: skip
def test_shards_equal_one_process_and_a_failed_one_is_reported(
    name: str, merged: str, python: str, tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    data = make_everything(tmp_path / "eval")
    variables = {"EVAL_DATA": str(data), "PYTHON": python}
    command = [str(tiny_dirs["chat"]), *ONE]
    target = data / merged.replace("NAME", tiny_dirs["chat"].name)
    assert script(name, *command, **variables).returncode == 0
    whole = target.read_bytes()
    done = script(name, *command, "--overwrite", CUDA_VISIBLE_DEVICES="0,1", **variables)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == whole
    target.unlink()
    image = next((data / name).rglob("*.jpg"))
    image.rename(tmp_path / "kept.jpg")
    done = script(name, *command, "--overwrite", CUDA_VISIBLE_DEVICES="0,1", **variables)
    assert done.returncode == 2
    assert "Shard(s)" in done.stderr and "of 2 failed" in done.stderr
    assert not target.exists()
    (tmp_path / "kept.jpg").rename(image)
    done = script(name, *command, CUDA_VISIBLE_DEVICES="0,1,2", **variables)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == whole


@pytest.mark.parametrize("gpus", ["", "0,1"])
def test_shards_watch_their_script(gpus: str, data: Path, tmp_path: Path) -> None:
    """Ctrl-C does not reach background processes of a shell, so each shard watches its parent, the script."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$LLAVA_EVAL_PARENT" "$PPID" >>{tmp_path}/seen\nexit 1\n')
    python.chmod(0o755)
    done = script("gqa", "a/model", EVAL_DATA=str(data), CUDA_VISIBLE_DEVICES=gpus, PYTHON=str(python))
    assert done.returncode == 2 and "failed" in done.stderr
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) == (2 if gpus else 1) and all(parent == real for parent, real in seen)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_report_missing_files_and_support_a_dry_run(name: str, tmp_path: Path) -> None:
    assert "usage: sh" in script(name).stderr
    (tmp_path / "eval").mkdir()
    done = script(name, "some/model", EVAL_DATA=str(tmp_path / "eval"), OPENAI_API_KEY="")
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and "docs/Evaluation.md" in done.stderr
    done = script(name, "a/checkpoint-9/", EVAL_DATA=str(tmp_path / "eval"), LLAVA_DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert "--model-path a/checkpoint-9 " in first and "--temperature 0 --conv-mode vicuna_v1" in first
    assert others and all("a_checkpoint-9" in line for line in others)
    assert list((tmp_path / "eval").iterdir()) == []


@pytest.mark.parametrize("name", LLAVA)
def test_scripts_of_llava_1_5_use_its_checkpoint(name: str) -> None:
    done = script(f"scripts/v1_5/eval/{name}", "--device", "cpu", LLAVA_DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "--model-path liuhaotian/llava-v1.5-13b " in first and first.split()[-2:][0] in ("--device", "cpu")
    other = script(f"scripts/v1_5/eval/{name}", LLAVA_DRY_RUN="1", CHECKPOINT="x/y")
    assert "--model-path x/y " in other.stdout


def test_json_results_of_science_qa_are_plain_json(data: Path) -> None:
    for path in data.rglob("*_result.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
