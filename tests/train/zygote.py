"""A process that imports everything once and forks the processes of runs, which start fast and can be killed.

Reads jobs from stdin, one JSON object a line: `argv`, `ranks`, `log`, `in_order` to leave the records undisturbed, and
`observe`, a folder for what each step takes and computes.
Answers each with `{"pids": [...]}`, and with `{"codes": [...]}` when all of its processes are gone; if one fails, the
others are ended, as torchrun does.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

GRACE = 10.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def take_records_in_order() -> None:
    """Disable shuffling: ranks take the records of the file in turn."""
    from torch.utils.data import SequentialSampler

    from llava.train.llava_trainer import LLaVATrainer

    LLaVATrainer._get_train_sampler = lambda self: SequentialSampler(self.train_dataset)  # type: ignore[method-assign]


def observe_steps(directory: Path, rank: int) -> None:
    """Write records and loss of each step to `rank-{rank}.jsonl`, and its gradients to `gradients-{step}.pt`.

    `sums-{step}.pt` holds the sums of the gradients of this rank's micro-batches in float64.
    """
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.steps import FILLER

    train, update, steps = LLaVATrainer.training_step, DeepSpeedEngine.step, []
    sums: dict[str, torch.Tensor] = {}

    def save(named: dict[str, torch.Tensor]) -> None:
        if rank == 0:
            torch.save(named, directory / f"gradients-{len(steps)}.pt")
            torch.save(sums, directory / f"sums-{len(steps)}.pt")

    def add(name: str, gradient: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + gradient.double()

    def training_step(self: Any, model: Any, step: Any) -> torch.Tensor:
        if not steps:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.register_hook(functools.partial(add, name))
        sums.clear()
        steps.append([record for taken, _ in step if taken != FILLER for record in taken.records])
        loss = train(self, model, step)
        with (directory / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"records": steps[-1], "loss": loss.item()}) + "\n")
        if not self.is_deepspeed_enabled:
            save({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        return loss

    def engine_step(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.is_gradient_accumulation_boundary():
            trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
            save({name: safe_get_full_grad(p).clone() for name, p in trained})
        update(self, *args, **kwargs)

    LLaVATrainer.training_step, DeepSpeedEngine.step = training_step, engine_step


def be_rank(rank: int, job: dict[str, Any], port: int) -> int:
    """In the fork: set up environment and output of this rank, then run the program."""
    ranks, log = job["ranks"], Path(job["log"])
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(log.parent)
    if ranks > 1 or "--deepspeed" in job["argv"]:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    import traceback

    from llava.train.train import main

    if job.get("in_order"):
        take_records_in_order()
    if job.get("observe"):
        observe_steps(Path(job["observe"]), rank)
    try:
        return int(main(job["argv"]))
    except BaseException:
        traceback.print_exc()
        return 1


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    import deepspeed  # noqa: F401 - imported here so that no fork has to
    import peft  # noqa: F401
    import torch

    import llava.train.train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        port, pids = free_port(), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                code = be_rank(rank, job, port)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            pids.append(pid)
        print(json.dumps({"pids": pids}), file=answers, flush=True)
        print(json.dumps({"codes": wait_all(pids)}), file=answers, flush=True)


def wait_all(pids: list[int]) -> list[int]:
    """Exit statuses, negative for a signal."""
    codes: dict[int, int] = {}
    limit = float("inf")
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            limit = min(limit, time.monotonic() + GRACE)
        if time.monotonic() > limit:
            for pid in [pid for pid in pids if pid not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
