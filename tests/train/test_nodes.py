"""Two nodes on loopback: a recipe on each, one global batch; a lost node ends the other, and both go on together."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.train import runs
from tests.train.zygote import free_port

RECIPE = runs.ROOT / "scripts_internvl" / "finetune_internvit6b_224to336_vicuna7b.sh"


def node(rank: int, port: int, flags: list[str], out: Path, log: Path) -> runs.Launched:
    """The recipe as it is started on one of two nodes with a device each."""
    names = {"NNODES": 2, "NODE_RANK": rank, "GPUS": 1, "MASTER_ADDR": "127.0.0.1", "PORT": port, "BATCH": 1}
    names |= {"OUTPUT_DIR": out, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    variables = [f"{name}={value}" for name, value in names.items()]
    return runs.Launched(["env", *variables, "sh", str(RECIPE), *flags], log)


@pytest.mark.slow
def test_two_nodes_train_and_survive_the_loss_of_one(
    tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = {"pretrain_mm_mlp_adapter": "", "bf16": False, "tf32": False, "gradient_accumulation_steps": 1}
    given |= {"dataloader_num_workers": 0, "save_strategy": "steps", "save_steps": 2, "use_cpu": None}
    given |= {"deepspeed": runs.ROOT / "scripts" / "zero2.json", "per_device_train_batch_size": 1}
    flags = runs.flags(tiny_dirs, small_data, out, 2, **given)
    pair = [node(rank, port, flags, out, tmp_path / f"log{rank}") for port in [free_port()] for rank in (0, 1)]
    limit = time.monotonic() + runs.DEADLINE
    while max(runs.steps_logged(out), default=0) < 5:
        assert [process.poll() for process in pair] == [None, None], (tmp_path / "log0").read_text()[-3000:]
        assert time.monotonic() < limit, (tmp_path / "log0").read_text()[-3000:]
        time.sleep(0.01)
    pair[1].kill()
    pair[1].wait(runs.DEADLINE)
    assert pair[0].wait(runs.DEADLINE) not in (0, None)
    assert "ended with status" in (tmp_path / "log0").read_text()
    pair = [node(rank, port, flags, out, tmp_path / f"log{rank}") for port in [free_port()] for rank in (0, 1)]
    assert [process.wait(runs.DEADLINE) for process in pair] == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert "Going on from" in (tmp_path / "log0").read_text()
    assert len(runs.losses(out)) == 16
