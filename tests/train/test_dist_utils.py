"""Process group variables derived from each launcher's environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from llava.errors import ConfigError
from llava.train import dist_utils
from tests.train import runs

SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_NODELIST": "host[1-2]", "SLURM_LOCALID": "1"}


def test_launcher_is_detected_from_the_environment() -> None:
    assert dist_utils.detect_launcher({}) is None
    assert dist_utils.detect_launcher({"RANK": "0", "WORLD_SIZE": "2", **SLURM}) == "pytorch"
    assert dist_utils.detect_launcher({"OMPI_COMM_WORLD_RANK": "0"}) == "mpi"
    assert dist_utils.detect_launcher(SLURM) == "slurm"


def test_torchrun_environment_is_kept() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert dist_utils.group_environment("pytorch", given) == given


def test_mpi_gets_the_default_port() -> None:
    given = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    derived = dist_utils.group_environment("mpi", {**given, "MASTER_ADDR": "a"})
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert derived == expected
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        dist_utils.group_environment("mpi", given)


def test_slurm_ranks_of_one_job_agree_on_host_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def expand(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "hostname", "host[1-2]"]
        return subprocess.CompletedProcess(command, 0, "host1\nhost2\n")

    monkeypatch.setattr(subprocess, "run", expand)
    one = dist_utils.group_environment("slurm", {**SLURM, "SLURM_JOB_ID": "71234"})
    other = dist_utils.group_environment("slurm", {**SLURM, "SLURM_PROCID": "0", "SLURM_JOB_ID": "71234"})
    assert one["RANK"] == "9" and one["WORLD_SIZE"] == "16" and one["LOCAL_RANK"] == "1"
    assert one["MASTER_ADDR"] == other["MASTER_ADDR"] == "host1"
    assert one["MASTER_PORT"] == other["MASTER_PORT"] == "31234"
    assert dist_utils.group_environment("slurm", {**SLURM, "MASTER_PORT": "5"}, port=7)["MASTER_PORT"] == "7"


def test_slurm_without_scontrol_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        dist_utils.group_environment("slurm", SLURM)


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="pytorch, mpi, slurm"):
        dist_utils.init_dist("ssh")


def test_a_group_of_one_is_joined_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    dist_utils.init_dist("pytorch")
    try:
        assert dist.get_backend() == "gloo" and dist.get_world_size() == 1
        assert os.environ["RANK"] == "0"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_faults_are_merged_over_ranks(tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path) -> None:
    """Each rank opens the images of its own samples."""
    records = json.loads((small_data / "pretrain.json").read_text())
    for index in range(0, 32, 8):
        records[index]["image"] = "lost.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    more = {"data_path": tmp_path / "data.json", "on_bad_sample": "skip", "per_device_train_batch_size": 16}
    runs.finish(runs.flags(tiny_dirs, small_data, tmp_path / "run", 1, **more), tmp_path / "log", ranks=2)
    counts = json.loads((tmp_path / "run/run.json").read_text())["data"]
    assert counts == {"bad": 4, "truncated": 0, "unsupervised": 0}
