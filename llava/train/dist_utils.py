"""Process groups started by torchrun ("pytorch"), Open MPI ("mpi") or slurm.

The environment of each launcher is translated to RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.distributed as dist

from llava.errors import ConfigError

DEFAULT_PORT: Final = 29500
SLURM_TIMEOUT: Final = datetime.timedelta(minutes=60)
LAUNCHERS: Final = ("pytorch", "mpi", "slurm")


def detect_launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """The launcher of this process, or None; torchrun inside a slurm job counts as torchrun."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "pytorch"
    if "OMPI_COMM_WORLD_RANK" in environment:
        return "mpi"
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        return "slurm"
    return None


def first_host(node_list: str) -> str:
    """The first host of a slurm node list, expanded by `scontrol`."""
    command = ["scontrol", "show", "hostname", node_list]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(f"scontrol cannot expand SLURM_NODELIST={node_list!r}: {error}; set MASTER_ADDR.") from error


def job_port(job_id: str) -> int:
    """A port derived from the slurm job id, the same on all ranks; 29500 when the job is unknown."""
    return 20000 + int(job_id) % 20000 if job_id.isdigit() else DEFAULT_PORT


def group_environment(
    launcher: str, environment: Mapping[str, str] = os.environ, port: int | None = None
) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process from its launcher's environment."""

    def value(name: str) -> str:
        if name not in environment:
            raise ConfigError(f"Launcher {launcher!r} needs {name} in the environment; start the run with it.")
        return environment[name]

    if launcher == "pytorch":
        names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return {"RANK": value("RANK")} | {name: environment[name] for name in names if name in environment}
    if launcher == "mpi":
        return {
            "RANK": value("OMPI_COMM_WORLD_RANK"),
            "WORLD_SIZE": value("OMPI_COMM_WORLD_SIZE"),
            "LOCAL_RANK": value("OMPI_COMM_WORLD_LOCAL_RANK"),
            "MASTER_ADDR": value("MASTER_ADDR"),
            "MASTER_PORT": str(port or environment.get("MASTER_PORT", DEFAULT_PORT)),
        }
    if launcher != "slurm":
        raise ConfigError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}.")
    rank = value("SLURM_PROCID")
    return {
        "RANK": rank,
        "WORLD_SIZE": value("SLURM_NTASKS"),
        "LOCAL_RANK": environment.get("SLURM_LOCALID") or str(int(rank) % max(1, torch.cuda.device_count())),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(value("SLURM_NODELIST")),
        "MASTER_PORT": str(port or environment.get("MASTER_PORT") or job_port(environment.get("SLURM_JOB_ID", ""))),
    }


def init_dist(launcher: str, backend: str = "nccl", port: int | None = None, **kwargs: Any) -> None:
    """Join the process group of `launcher`; NCCL becomes gloo on a machine without GPUs.

    Exports the derived variables for libraries that read the environment. Raises `ConfigError` for an unknown launcher
    or a missing variable.
    """
    derived = group_environment(launcher, os.environ, port)
    if multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method("spawn")
    os.environ.update(derived)
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(derived.get("LOCAL_RANK", derived["RANK"])) % gpus)
    elif backend == "nccl":
        backend = "gloo"
    if launcher == "slurm":
        kwargs.setdefault("timeout", SLURM_TIMEOUT)
    dist.init_process_group(backend=backend, **kwargs)


def any_rank(flags: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Element-wise maximum over all ranks, int64 on `device`; collective, with tensors of the same shape."""
    shared = flags.to(device, torch.int64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared
