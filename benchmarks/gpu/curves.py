"""Short training runs on the device: the golden curves, and each precision and method against float32 on the CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.golden import NO_GOLDEN, Comparison, Mismatch, copy_models, exact_float32
from benchmarks.gpu.runner import Skip

ROOT: Final = Path(__file__).parents[2]
PRECISIONS: Final[
    dict[str, tuple[dict[str, Any], float]]
] = {  # flags, and the largest difference of a loss from float32 on the CPU
    "float32": ({}, 2e-3),
    "float32, checkpointing": ({"gradient_checkpointing": True}, 2e-3),
    "bf16": ({"bf16": True}, 0.02),
    "fp16": ({"fp16": True}, 0.05),
}
LORA: Final[dict[str, Any]] = {"lora_enable": True, "lora_r": 8, "learning_rate": 1e-2}
ADAPTERS: Final = {"LoRA": LORA, "QLoRA, 4-bit": {**LORA, "bits": 4, "bf16": True}}
ZERO_SECONDS: Final = 60.0


@contextlib.contextmanager
def fresh_accelerator() -> Iterator[None]:
    """Reset Accelerate's state, which keeps device and precision of the first run in a process."""
    from accelerate.state import AcceleratorState, GradientState

    names = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")
    before = {name: os.environ.pop(name, None) for name in names}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def train(argv: Sequence[str], order: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Run the training program in this process; return its logged steps. `order` sets the order of the samples."""
    import torch.utils.data

    from llava.train import llava_trainer
    from llava.train.train import train as run

    samplers: tuple[Any, ...] = (torch.utils.data.RandomSampler, llava_trainer.LengthGroupedSampler)
    before = [sampler.__iter__ for sampler in samplers]
    out = Path(argv[list(argv).index("--output_dir") + 1])
    with fresh_accelerator(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            if order is not None:
                for sampler in samplers:
                    sampler.__iter__ = lambda self: iter(list(order))
            run(argv)
        finally:
            for kind, method in zip(samplers, before):
                kind.__iter__ = method
    return logged(out)


def logged(out: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, with their losses."""
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


def curves(bench: Bench) -> None:
    if bench.cuda and torch.cuda.device_count() > 1:
        raise Skip("training uses one GPU per process: set CUDA_VISIBLE_DEVICES to one of them")
    zero = _start_zero(bench)
    try:
        with exact_float32():
            for name in ("pretrain",) if bench.quick else ("pretrain", "finetune"):
                _golden_curve(bench, name)
            reference = _variants(bench)
            _finish_zero(bench, zero, reference)
    finally:
        if zero is not None and zero.poll() is None:
            os.killpg(zero.pid, signal.SIGKILL)
            zero.wait()


def _golden_curve(bench: Bench, name: str) -> None:
    """Losses, learning rates and final weights of a golden run."""
    what = f"golden curve of {name}"
    if bench.golden is None or not (bench.golden / "train" / f"curve_{name}.json").is_file():
        bench.skip(what, NO_GOLDEN)
        return
    if not bench.in_time(what):
        return
    data = bench.golden / "train"
    stored = json.loads((data / f"curve_{name}.json").read_text(encoding="utf-8"))
    out, root, by = bench.work / f"curve-{name}", copy_models(bench), Comparison()
    flags = {**stored["flags"], "output_dir": str(out), "disable_tqdm": "True", "plot_loss": "False"}
    flags["use_cpu"] = str(not bench.cuda)
    flags["model_name_or_path"] = str(root / flags["model_name_or_path"])
    flags["vision_tower"] = str(root / Path(flags["vision_tower"]).name)
    for key in ("image_folder", "pretrain_mm_mlp_adapter", "data_path"):
        flags[key] = str(data / Path(flags[key]).relative_to("train"))
    steps = train([part for key, value in flags.items() for part in (f"--{key}", value)], stored["order"])
    note = ""
    try:
        by.close([step["loss"] for step in steps], stored["loss"], stored["loss_atol"], 0)
        by.close([step["learning_rate"] for step in steps], stored["lr"], 1e-9, 1e-4)
        weights = _saved_weights(out)
        for key, summary in stored["weights"].items():
            by.summary(weights[key].float(), summary, stored["weight_atol"], 0)
        note = f"largest difference {by.worst:.2g} of the tolerance"
    except Mismatch as error:
        note = str(error)
    bench.check(what, by.worst <= 1 and len(steps) == len(stored["loss"]), f"{len(steps)} steps", note)


def _saved_weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if (out / "mm_projector.bin").is_file():
        found: dict[str, torch.Tensor] = torch.load(out / "mm_projector.bin", map_location="cpu", weights_only=True)
        return found
    return {name: tensor for file in out.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def _flags(bench: Bench, name: str, **more: Any) -> list[str]:
    """Command line of a stage 2 run on a tiny model and a few images, created at the first call."""
    from tests import tiny
    from tests.train import runs

    root = bench.work / "tiny-train"
    dirs = {"tower": root / "tower", "base": root / "base"}
    if not root.is_dir():
        tiny.make_tower(dirs["tower"])
        tiny.make_base(dirs["base"], hidden_size=64, intermediate_size=128)
        runs.make_data(root / "data", samples=8 if bench.quick else 32, text_rows=(1, 6))
    out = bench.work / f"run-{name.replace(' ', '-')}"
    return runs.flags(dirs, root / "data", out, 2, **{"use_cpu": None if bench.cuda else True, **more})


def _losses(bench: Bench, name: str, **more: Any) -> list[float]:
    return [step["loss"] for step in train(_flags(bench, name, **more))]


def _variants(bench: Bench) -> list[float]:
    """Compare each precision with float32 on the CPU, and train each adapter; return the losses on the CPU."""
    reference = _losses(bench, "reference", use_cpu=True)
    for name, (flags, limit) in PRECISIONS.items():
        what = f"training in {name} against float32 on the CPU"
        if flags.get("fp16") and not bench.cuda:
            bench.skip(what, "float16 training needs a GPU")
        elif flags.get("bf16") and bench.cuda and bench.dtype is not torch.bfloat16:
            bench.skip(what, "this GPU does not support bfloat16")
        elif bench.in_time(what):
            found = _losses(bench, name, **flags)
            far = max(abs(a - b) for a, b in zip(found, reference, strict=True))
            bench.check(what, far <= limit, f"{far:.2g}", f"largest difference of a loss, at most {limit}")
    for name, flags in ADAPTERS.items():
        needed = [package for package in ("peft", "bitsandbytes") if package == "peft" or "bits" in flags]
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            bench.skip(f"training with {name}", f"{missing[0]} is not installed")
        elif bench.in_time(f"training with {name}"):
            found = _losses(bench, name, **flags, num_train_epochs=2)
            bench.check(f"training with {name}: the loss falls", found[-1] < found[0], f"{found[0]} to {found[-1]}")
    return reference


def _start_zero(bench: Bench) -> subprocess.Popen[bytes] | None:
    """Two steps under ZeRO-3, in a separate process, since its launch is the slowest step of this part."""
    missing = importlib.util.find_spec("deepspeed") is None
    if missing or bench.quick:
        reason = "deepspeed is not installed" if missing else "skipped in quick runs: its launch takes too long"
        bench.skip("training under ZeRO-3", reason)
        return None
    argv = _flags(bench, "zero3", use_cpu=None, max_steps=2, deepspeed=ROOT / "scripts" / "zero3.json")
    # As set by torchrun, whose workers have their own sessions and would outlive a killed launcher.
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **rank, **rendezvous, **settings}
    if not bench.cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (bench.work / "zero3.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "llava" / "train" / "train.py"), *argv],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=bench.work,
            start_new_session=True,
        )


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _finish_zero(bench: Bench, process: subprocess.Popen[bytes] | None, reference: list[float]) -> None:
    """The first loss, before any step, must equal that of one process without ZeRO."""
    if process is None:
        return
    what = "training under ZeRO-3: first loss against float32 on the CPU"
    try:
        code = process.wait(max(5.0, min(ZERO_SECONDS, bench.left())))
    except subprocess.TimeoutExpired:
        bench.skip(what, "it did not finish in time")
        return
    if code:
        log = (bench.work / "zero3.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(log[-15:]), flush=True)
        bench.check(what, False, f"exit status {code}", log[-1] if log else "")
        return
    found = [step["loss"] for step in logged(bench.work / "run-zero3")]
    far = abs(found[0] - reference[0])
    bench.check(what, far <= 2e-3 and len(found) == 2, f"{far:.2g}", "at most 0.002")
