"""The public golden numbers, group by group, where they are present (`LLAVA_SHARED`, default `../shared`)."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.benchmarks import pope
from tests.test_package import ROOT

GROUPS = ("model", "model-448", "model-branches", "embedded", "prompt", "image", "train")
CURVES = ("pretrain-curve", "finetune-curve")


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS + CURVES)
def test_golden_group(group: str, golden_dir: Path) -> None:
    command = [sys.executable, str(golden_dir / "checks.py"), group]
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    found = re.match(r"(\d+)/(\d+) golden cases match", lines[-1])
    assert found is not None, lines[-20:]
    assert found[1] == found[2], lines[-20:]
    assert int(found[2]) > 0
    assert done.returncode == 0


@pytest.mark.golden
@pytest.mark.slow
def test_golden_evaluation(golden_dir: Path) -> None:
    """Scorers and converters by their command lines, as users call them."""
    environment = {**os.environ, "GOLDEN_PYTHON": sys.executable, "GOLDEN_BUDGET": "240"}
    command = [sys.executable, str(golden_dir / "eval" / "checks.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    found = re.match(r"(\d+)/(\d+) probes hold", lines[-1])
    assert found is not None, lines[-20:]
    assert found[1] == found[2], lines[-60:]
    assert int(found[2]) > 0
    assert done.returncode == 0


@pytest.mark.golden
def test_golden_pope_of_llava_13b(golden_dir: Path, tmp_path: Path) -> None:
    """The published numbers from the published answers."""
    source = golden_dir / "eval" / "pope_full"
    for path in source.rglob("*.gz"):
        target = tmp_path / path.relative_to(source).with_suffix("")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(gzip.decompress(path.read_bytes()))
    result = pope.score_files(
        tmp_path / "coco", tmp_path / "llava_pope_test.jsonl", tmp_path / "answers" / "llava-v1.5-13b.jsonl"
    )
    expected = json.loads((source / "expected.json").read_text(encoding="utf-8"))
    assert result["mean_f1"] == pytest.approx(expected["mean_f1_x100"], abs=1e-4)
    assert result["categories"].keys() == expected["categories"].keys()
    for name, figures in expected["categories"].items():
        found = result["categories"][name]
        assert found["counts"] == figures["tp_fp_tn_fn"]
        assert found["n"] == figures["n"]
        for key in ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio"):
            assert found[key.lower().replace(" score", "").replace(" ", "_")] == figures[key]
