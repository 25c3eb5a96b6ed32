"""Training steps of both stages at full size: time against the floor, model FLOPs utilisation, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch

from benchmarks.floor import train_cost
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.inference import shape
from benchmarks.gpu.machine import ceilings
from benchmarks.gpu.models import full_model, pixels_of
from benchmarks.gpu.runner import free_memory
from benchmarks.gpu.timing import free_bytes, median_seconds, peak_bytes, reset_peak
from benchmarks.train_step import image_batch, work
from llava.constants import IGNORE_INDEX
from llava.train import estimate, model_setup
from llava.train.estimate import RunConfig
from llava.train.flops import Trainable


@dataclass(frozen=True)
class Stage:
    """Trainable parts, and one micro-batch: `rows` rows of one image and `text` tokens each."""

    name: str
    learns: Trainable
    rows: int
    text: int


STAGES: Final = (
    Stage("stage 1", Trainable(language=False), 32, 40),
    Stage("stage 2", Trainable(), 16, 160),
)
LEAST_ROWS: Final = 4


def training(bench: Bench) -> None:
    """Both stages on one model, without and with gradient checkpointing if memory allows."""
    bench.release()
    for stage in STAGES:
        for checkpointing in (False, True):
            what = f"{stage.name} step" + (", checkpointing" if checkpointing else "")
            if bench.in_time(what):
                _measure(bench, stage, checkpointing, what)
                free_memory(bench.device)
    bench.release()


def _measure(bench: Bench, stage: Stage, checkpointing: bool, what: str) -> None:
    """Time a step with as many rows as memory allows, at most those of the stage."""
    model = full_model(bench)
    rows = 2 if bench.quick else stage.rows
    held = sum(parameter.nbytes for parameter in model.parameters())
    while True:
        setup = _setup(bench, model, stage, rows, checkpointing)
        needed, free = estimate.required_bytes(setup), free_bytes(bench.device) + held
        if not bench.cuda or needed <= free:
            break
        if rows // 2 < LEAST_ROWS:
            bench.skip(what, f"{rows} rows need {needed / GIB:.0f} GiB, and {free / GIB:.0f} GiB are free")
            return
        rows //= 2
    try:
        _steps(bench, model, stage, setup, what)
    except torch.cuda.OutOfMemoryError:
        bench.skip(what, f"out of memory with {rows} rows, estimated to need {needed / GIB:.0f} GiB")


def _setup(bench: Bench, model: Any, stage: Stage, rows: int, checkpointing: bool) -> RunConfig:
    """The step, as described for the memory estimate."""
    size = shape(model)
    supervised = (stage.text - 10) / (stage.text - 1 + size.image_tokens)
    return RunConfig(
        size,
        stage.learns,
        batch_size=rows,
        text_tokens=stage.text - 1,
        supervised=supervised,
        dtype_bytes=bench.dtype.itemsize,
        gradient_checkpointing=checkpointing,
        foreach=not bench.cuda,
    )


def _steps(bench: Bench, model: Any, stage: Stage, setup: RunConfig, what: str) -> None:
    """Time full steps with autocast and fused AdamW (no DeepSpeed)."""
    batch = image_batch(setup.batch_size, model.config.vocab_size, pixels_of(bench), stage.text)
    flops = work(_prepared(bench, model, stage, setup.gradient_checkpointing), batch)
    on_device = {name: tensor.to(bench.device) for name, tensor in batch.items()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=bench.cuda)
    losses: list[torch.Tensor] = []
    reset_peak(bench.device)
    try:
        step = _step(bench, model, on_device, optimizer, losses)
        repeats, warmup = (1, 1) if bench.quick else (5, 2)
        seconds = median_seconds(step, bench.device, warmup=warmup, repeats=repeats, budget=6.0, clock=True)
    finally:
        optimizer.state.clear()
        model.zero_grad(set_to_none=True)
    _report(bench, stage, setup, seconds, flops, batch, what)
    found = torch.stack(losses)
    bench.check(f"{what}: losses are finite", bool(found.isfinite().all()), f"{found[0]:.3f} to {found[-1]:.3f}")


def _prepared(bench: Bench, model: Any, stage: Stage, checkpointing: bool) -> Any:
    """Set trainable parts and precision, as the training program does."""
    flags = SimpleNamespace(
        tune_mm_mlp_adapter=not stage.learns.language,
        freeze_backbone=False,
        mm_use_im_start_end=False,
        tune_vit_pos_embedding=False,
        unfreeze_mm_vision_tower=False,
        unfreeze_mm_vision_layers=0,
    )
    args = SimpleNamespace(lora_enable=False, freeze_llm=False, freeze_mm_mlp_adapter=False, lora_bias="none")
    model_setup.default_freeze_policy(model, flags, args)  # type: ignore[arg-type]
    model_setup.set_precision(model, bench.dtype, deepspeed=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    elif model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return model.train()


def _step(
    bench: Bench, model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer, losses: list[torch.Tensor]
) -> Callable[[], None]:
    scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.dtype is torch.float16)

    def step() -> None:
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.cuda):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())

    return step


def _report(
    bench: Bench, stage: Stage, setup: RunConfig, seconds: float, flops: float, batch: dict[str, Any], what: str
) -> None:
    cost = train_cost(
        setup.shape,
        stage.learns,
        tokens=setup.positions,
        length=setup.positions / setup.batch_size,
        images=setup.batch_size,
        supervised=float((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        recompute=setup.gradient_checkpointing,
        itemsize=setup.dtype_bytes,
    )
    peak, floor = ceilings(bench), cost.seconds(ceilings(bench))
    what = f"{what}, {setup.batch_size} rows"
    bench.line(what, seconds, "s", floor=floor)
    bench.line(f"{what}: model FLOPs utilisation", 100 * flops / seconds / peak.flops, "%")
    predicted = {"predicted": estimate.peak_bytes(setup) / GIB} if bench.cuda else {}
    bench.line(f"{what}: peak memory", peak_bytes(bench.device) / GIB, "GiB", **predicted)
