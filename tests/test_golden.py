"""The public golden numbers, group by group, where they are present (`LLAVA_SHARED`, default `../shared`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
