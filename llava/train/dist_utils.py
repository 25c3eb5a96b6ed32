"""Set up the process group for a launcher: torchrun ("pytorch"), Open MPI ("mpi") or slurm (spec/train.md §13).

A launcher only differs in the environment it provides; each is translated into RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT, from which the group is made.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from llava.errors import ConfigError

DEFAULT_PORT = 29500
SLURM_TIMEOUT = datetime.timedelta(minutes=60)
LAUNCHERS = ("pytorch", "mpi", "slurm")


def detect_launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """The launcher this process was started by, or None; torchrun inside a slurm job counts as torchrun."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "pytorch"
    if "OMPI_COMM_WORLD_RANK" in environment:
        return "mpi"
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        return "slurm"
    return None


def _value(environment: Mapping[str, str], name: str, launcher: str) -> str:
    try:
        return environment[name]
    except KeyError as error:
        raise ConfigError(f"Launcher {launcher!r} needs {name} in the environment; start the run with it.") from error


def first_host(node_list: str) -> str:
    """The first host of a slurm node list, as slurm's own tool expands it."""
    command = ["scontrol", "show", "hostname", node_list]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"scontrol cannot expand SLURM_NODELIST={node_list!r}: {error}; set MASTER_ADDR.") from error
    return hosts[0]


def job_port(job_id: str) -> int:
    """One port for all tasks of a job, so that ranks cannot disagree (T25); 29500 when the job is unknown."""
    return 20000 + int(job_id) % 20000 if job_id.isdigit() else DEFAULT_PORT


def group_environment(
    launcher: str, environment: Mapping[str, str] = os.environ, port: int | None = None
) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT of this process, from what the launcher provides."""
    if launcher == "pytorch":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return {name: environment[name] for name in names if name in environment} | {
            "RANK": _value(environment, "RANK", launcher)
        }
    if launcher == "mpi":
        return {
            "RANK": _value(environment, "OMPI_COMM_WORLD_RANK", launcher),
            "WORLD_SIZE": _value(environment, "OMPI_COMM_WORLD_SIZE", launcher),
            "LOCAL_RANK": _value(environment, "OMPI_COMM_WORLD_LOCAL_RANK", launcher),
            "MASTER_ADDR": _value(environment, "MASTER_ADDR", launcher),
            "MASTER_PORT": str(port or environment.get("MASTER_PORT", DEFAULT_PORT)),
        }
    if launcher != "slurm":
        raise ConfigError(f"Unknown launcher {launcher!r}; use {', '.join(LAUNCHERS)}.")
    rank = _value(environment, "SLURM_PROCID", launcher)
    local = environment.get("SLURM_LOCALID") or str(int(rank) % max(1, torch.cuda.device_count()))
    return {
        "RANK": rank,
        "WORLD_SIZE": _value(environment, "SLURM_NTASKS", launcher),
        "LOCAL_RANK": local,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(_value(environment, "SLURM_NODELIST", launcher)),
        "MASTER_PORT": str(port or environment.get("MASTER_PORT") or job_port(environment.get("SLURM_JOB_ID", ""))),
    }


def init_dist(launcher: str, backend: str = "nccl", port: int | None = None, **kwargs: Any) -> None:
    """Join the process group of `launcher`; NCCL falls back to gloo on a machine without GPUs.

    Raises `ConfigError` for an unknown launcher or a missing variable. Exports what it derived, so that libraries
    which read the environment agree.
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
    """Zeros and ones, one where any rank has it; all ranks must call, with tensors of one shape."""
    shared = flags.to(device, torch.int64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared
