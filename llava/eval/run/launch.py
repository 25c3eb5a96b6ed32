"""Data-parallel evaluation: one process per visible GPU, or the processes of torchrun."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from llava import parent_process
from llava.errors import ConfigError, DataError


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The entries of `CUDA_VISIBLE_DEVICES`; empty if it is unset."""
    return [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def torchrun_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """(rank, world size) of a torchrun process, None if there is only one process."""
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except KeyError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"RANK and WORLD_SIZE must be integers ({error}); start the processes with torchrun."
        ) from error
    return (rank, size) if size > 1 else None


def run_shards(module: str, arguments: Sequence[str], count: int) -> None:
    """Run `python -m MODULE ARGUMENTS --num-chunks COUNT --chunk-idx K` for every K in parallel, one GPU each.

    Waits for all processes. Raises `DataError` with the exit statuses of those that failed.
    """
    gpus = visible_gpus()
    processes = []
    for index in range(count):
        environment = {**os.environ, parent_process.VARIABLE: str(os.getpid())}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        command = [sys.executable, "-m", module, *arguments, "--num-chunks", str(count), "--chunk-idx", str(index)]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        statuses = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    failed = [f"{index} (status {status})" for index, status in enumerate(statuses) if status]
    if failed:
        raise DataError(
            f"{len(failed)} of {count} shards failed, see above: {', '.join(failed)}; nothing is merged or scored. Run "
            "the same command again to resume them."
        )


def gather_statuses(status: int) -> list[int]:
    """All-gather the exit statuses of the torchrun processes."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=14))
    try:
        statuses: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(statuses, status)
    finally:
        dist.destroy_process_group()
    return statuses
