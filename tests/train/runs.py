"""Small runs of both stages on the tiny models: data, flags, and ways to start (and kill) them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("red", "blue", "green", "teal", "gray", "brown", "black", "yellow")
DEADLINE = 480.0


def make_data(root: Path, *, samples: int = 32, text_rows: Sequence[int] = ()) -> Path:
    """`root/{pretrain,finetune}.json` and `root/images`; rows in `text_rows` of the second have no image.

    Every answer has as many tokens as every other, so that a mean over ranks equals the mean over their samples.
    """
    (root / "images").mkdir(parents=True)
    pretrain: list[dict[str, Any]] = []
    finetune: list[dict[str, Any]] = []
    for index in range(samples):
        word = WORDS[index % len(WORDS)]
        color = tuple((37 * index * k + 90) % 256 for k in (1, 2, 3))
        Image.new("RGB", (48 + index % 3 * 20, 56), color).save(root / "images" / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": f"it is {word}"}]
        pretrain.append({"id": index, "image": f"{index}.png", "conversations": turns})
        if index in text_rows:
            turns = [{"from": "human", "value": "Name a color."}, turns[1]]
            finetune.append({"id": index, "conversations": turns})
        else:
            finetune.append(pretrain[-1])
    (root / "pretrain.json").write_text(json.dumps(pretrain))
    (root / "finetune.json").write_text(json.dumps(finetune))
    return root


def flags(dirs: Mapping[str, Path], data: Path, output_dir: Path, stage: int, **more: Any) -> list[str]:
    """The command line of a stage-1 or stage-2 run of 8 steps; `more` overrides, `None` removes a flag."""
    values: dict[str, Any] = {
        "model_name_or_path": dirs["base"],
        "vision_tower": dirs["tower"],
        "mm_vision_image_size": 56,
        "mm_vision_select_layer": -4,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "image_folder": data / "images",
        "output_dir": output_dir,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "model_max_length": 256,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
        "report_to": "none",
    }
    if stage == 1:
        values |= {"version": "plain", "tune_mm_mlp_adapter": True, "data_path": data / "pretrain.json"}
    else:
        values |= {"version": "v1", "image_aspect_ratio": "pad", "data_path": data / "finetune.json"}
    values |= more
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def command(argv: Sequence[str], ranks: int, program: Sequence[str]) -> list[str]:
    """One process, or `ranks` processes under torchrun on a free port."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, *program, *argv]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Forked:
    """The processes of a run, forked by `tests.train.zygote`, with the interface of one process."""

    def __init__(self, argv: Sequence[str], log: Path, ranks: int, **more: Any):
        self.zygote = zygote()
        assert self.zygote.stdin and self.zygote.stdout
        job = {"argv": list(argv), "ranks": ranks, "log": str(log), **more}
        self.zygote.stdin.write(json.dumps(job).encode() + b"\n")
        self.zygote.stdin.flush()
        self.pids: list[int] = self._answer(DEADLINE)["pids"]
        self.codes: list[int] | None = None

    def _answer(self, timeout: float) -> dict[str, Any]:
        stdout = self.zygote.stdout
        assert stdout
        if not select.select([stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("zygote", timeout)
        answer: dict[str, Any] = json.loads(stdout.readline() or b"{}")
        return answer

    def wait(self, timeout: float) -> int:
        if self.codes is None:
            self.codes = self._answer(timeout)["codes"]
        return next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: int) -> None:
        """Send a signal to all of its processes, also its data loader workers."""
        send(self.pids, number)

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)


def send(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes and their descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        pids = [*pids, *(child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True))]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@functools.cache
def zygote() -> subprocess.Popen[bytes]:
    """The zygote of this test session; it exits when its stdin closes."""
    command = [sys.executable, "-m", "tests.train.zygote"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT, bufsize=0
    )
    atexit.register(process.kill)
    return process


class Launched:
    """A run under its launcher, in its own session."""

    def __init__(self, command: Sequence[str], log: Path):
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment(), cwd=log.parent,
                start_new_session=True,
            )  # fmt: skip
        self.wait, self.poll = self.process.wait, self.process.poll

    def send(self, number: int) -> None:
        """Send a signal to all of its processes, also the workers that torchrun starts in sessions of their own."""
        send([self.process.pid], number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)


def start(
    argv: Sequence[str], log: Path, ranks: int = 1, program: Sequence[str] | None = None, **more: Any
) -> Forked | Launched:
    """The training program in `ranks` processes; with `program`, that one under the real launcher."""
    return Forked(argv, log, ranks, **more) if program is None else Launched(command(argv, ranks, program), log)


def finish(argv: Sequence[str], log: Path, ranks: int = 1, program: Sequence[str] | None = None, **more: Any) -> None:
    """Run to the end; on failure the assertion shows the tail of the log."""
    process = start(argv, log, ranks, program, **more)
    try:
        code = process.wait(DEADLINE)
    finally:
        if process.poll() is None:
            process.kill()
    assert code == 0, log.read_text(errors="replace")[-3000:]


def steps_logged(output_dir: Path) -> list[int]:
    path = output_dir / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line]


def kill_at(
    argv: Sequence[str],
    output_dir: Path,
    step: int,
    log: Path,
    ranks: int = 1,
    program: Sequence[str] | None = None,
    number: int = signal.SIGKILL,
) -> int:
    """Start, and send a signal to all of its processes as soon as `step` is logged; returns the exit status."""
    process = start(argv, log, ranks, program)
    limit = time.monotonic() + DEADLINE
    try:
        while max(steps_logged(output_dir), default=0) < step:
            assert process.poll() is None, "ended too early: " + log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < limit, "did not get there in time: " + log.read_text(errors="replace")[-3000:]
            time.sleep(0.005)
        process.send(number)
        status = process.wait(DEADLINE)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(DEADLINE)
    assert status, "the run was over before it could be ended"
    return status


def history(output_dir: Path) -> list[dict[str, Any]]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def losses(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in history(output_dir)]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that a run saved, in any format."""
    if (directory / "mm_projector.bin").is_file():
        state: dict[str, torch.Tensor] = torch.load(directory / "mm_projector.bin", weights_only=True)
        return state
    if (directory / "adapter_model.safetensors").is_file():
        beside: dict[str, torch.Tensor] = torch.load(directory / "non_lora_trainables.bin", weights_only=True)
        return load_file(directory / "adapter_model.safetensors") | beside
    return load_file(directory / "model.safetensors")


def assert_equal_weights(one: Path, other: Path, atol: float = 0.0) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        far = float((left[name].float() - right[name].float()).abs().max())
        assert far <= atol, f"{name} differs by {far}"


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same losses, learning rates, counts and final weights, to the last bit."""
    assert losses(one) == losses(other)
    for key in ("learning_rate", "supervised_tokens"):
        assert [entry[key] for entry in history(one)] == [entry[key] for entry in history(other)]
    (first, second) = (json.loads((run / "run.json").read_text())["train_loss"] for run in (one, other))
    assert abs(first - second) < 1e-3  # log lines, of which a resume knows the losses before it, have four decimals
    assert_equal_weights(one, other)
