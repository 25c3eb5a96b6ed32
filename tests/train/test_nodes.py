"""Two nodes: a recipe on each, one global batch; losing a node ends the other, and both resume together.

On loopback, and with `LLAVA_NETNS=1` (as root, with iproute2) also in two network namespaces joined by a cable of their
own, which share nothing of the network with each other or with the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train import runs
from tests.train.zygote import free_port

RECIPE = runs.ROOT / "scripts_internvl" / "finetune_internvit6b_224to336_vicuna7b.sh"


LOOPBACK = [("127.0.0.1", "lo", []), ("127.0.0.1", "lo", [])]
Host = tuple[str, str, list[str]]  # address, interface, and the words in front of a command that is run there


@pytest.fixture(params=["loopback", "namespaces"])
def hosts(request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    if request.param == "loopback":
        yield LOOPBACK
        return
    if os.environ.get("LLAVA_NETNS") != "1":
        pytest.skip("LLAVA_NETNS=1 is not set")
    made: list[Host] = [(f"10.213.7.{n}", f"llv{n}", ["ip", "netns", "exec", f"llava-{n}"]) for n in (1, 2)]
    for address, cable, inside in made:
        steps = [["ip", "netns", "add", inside[-1]], [*inside, "ip", "link", "set", "lo", "up"]]
        steps += [["ip", "link", "add", cable, "type", "veth", "peer", "llv2"]] if cable == "llv1" else []
        steps += [["ip", "link", "set", cable, "netns", inside[-1]]]
        steps += [[*inside, "ip", "addr", "add", f"{address}/24", "dev", cable]]
        for step in [*steps, [*inside, "ip", "link", "set", cable, "up"]]:
            subprocess.run(step, check=True)
    yield made
    for _, _, inside in made:
        subprocess.run(["ip", "netns", "del", inside[-1]], check=True)


def node(hosts: list[Host], rank: int, port: int, flags: list[str], out: Path, log: Path) -> runs.Launched:
    """Start the recipe on one of two nodes with one device each."""
    _, interface, inside = hosts[rank]
    names = {"NNODES": 2, "NODE_RANK": rank, "GPUS": 1, "MASTER_ADDR": hosts[0][0], "PORT": port, "BATCH": 1}
    names |= {"OUTPUT_DIR": out, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    variables = [f"{name}={value}" for name, value in {**names, "GLOO_SOCKET_IFNAME": interface}.items()]
    return runs.Launched([*inside, "env", *variables, "sh", str(RECIPE), *flags], log)


@pytest.mark.slow
def test_two_nodes_train_and_survive_the_loss_of_one(
    hosts: list[Host], tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = {"pretrain_mm_mlp_adapter": "", "bf16": False, "tf32": False, "global_batch_size": 2, "loss_group_size": 1}
    given |= {"dataloader_num_workers": 0, "save_strategy": "steps", "save_steps": 2, "use_cpu": None}
    given |= {"deepspeed": runs.ROOT / "scripts" / "zero2.json", "per_device_train_batch_size": 1}
    flags = runs.flags(tiny_dirs, small_data, out, 2, **given)

    def both() -> list[runs.Launched]:
        port = free_port()
        return [node(hosts, rank, port, flags, out, tmp_path / f"log{rank}") for rank in (0, 1)]

    pair = both()
    limit = time.monotonic() + runs.DEADLINE
    while max(runs.steps_logged(out), default=0) < 5:
        assert [process.poll() for process in pair] == [None, None], (tmp_path / "log0").read_text()[-3000:]
        assert time.monotonic() < limit, (tmp_path / "log0").read_text()[-3000:]
        time.sleep(0.01)
    pair[1].kill()
    pair[1].wait(runs.DEADLINE)
    assert pair[0].wait(runs.DEADLINE) not in (0, None)
    assert "ended with status" in (tmp_path / "log0").read_text()
    pair = both()
    assert [process.wait(runs.DEADLINE) for process in pair] == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert "Resuming from" in (tmp_path / "log0").read_text()
    assert len(runs.losses(out)) == 16
