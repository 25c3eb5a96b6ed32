"""The same steps, losses and gradients for every way to deal the records of a step out to ranks and micro-batches.

One process with one record per micro-batch is the reference; mixed images and text, answers of very unequal lengths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import runs
from tests.train.test_deepspeed import SCRIPTS

Dirs = dict[str, Path]
STEP, GROUP, STEPS = 12, 4, 2
TOLERANCE = 1e-5
ALONE = [(1, None, batch, None) for batch in (1, 2, 3, 4, 5, 6, 12)]
ALONE += [(1, None, 1, tokens) for tokens in (60, 100, 130, 200, 300, 400)]
TWO = [(2, zero, *how) for zero in (None, "zero2", "zero3") for how in ((1, None), (1, 200))]
TWO += [(2, "zero1", 4, None), (2, "zero1", 1, 200)]
FOUR = [(4, None, 1, 200), (4, "zero2", 2, None), (4, "zero3", 1, 200)]
Partition = tuple[int, str | None, int, int | None]  # ranks, ZeRO file, records and tokens per micro-batch
PARTITIONS: list[Partition] = [*ALONE, *TWO, *FOUR]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 records, a third of them text, with answers of 1 to 60 words."""
    root = runs.make_data(tmp_path_factory.mktemp("unequal") / "mix", samples=30, text_rows=range(0, 30, 3))
    records = json.loads((root / "finetune.json").read_text())
    draw = random.Random(5)
    for record in records:
        words = draw.choices(runs.WORDS, k=draw.choice((1, 2, 5, 20, 60)))
        record["conversations"][1]["value"] = " ".join(words)
    (root / "finetune.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def compute(tiny_dirs: Dirs, unequal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs two steps of a partition and returns its folder; prints the figures of all of them at the end."""
    root = tmp_path_factory.mktemp("partitions")
    figures: dict[Partition, tuple[float, float]] = {}

    def run(partition: Partition) -> Path:
        ranks, zero, batch, tokens = partition
        out = root / f"{ranks}-{zero}-{batch}-{tokens}"
        if not out.exists():
            out.mkdir()
            more: dict[str, Any] = {"deepspeed": SCRIPTS / f"{zero}.json", "use_cpu": None} if zero else {}
            argv = runs.flags(
                *(tiny_dirs, unequal, out / "run", 2),
                optim="sgd",
                learning_rate=0.01,
                max_grad_norm=0,
                max_steps=STEPS,
                global_batch_size=STEP,
                loss_group_size=GROUP,
                per_device_train_batch_size=batch,
                micro_batch_tokens=tokens,
                group_by_modality_length=True,
                unfreeze_mm_vision_tower=True,
                **more,
            )
            runs.finish(argv, out / "log", ranks=ranks, observe=str(out))
        return out

    run.figures = figures  # type: ignore[attr-defined]
    yield run
    print("\nranks  ZeRO   records  tokens   loss     gradients")
    for (ranks, zero, batch, tokens), (loss, gradients) in figures.items():
        print(f"{ranks:5}  {zero or '-':6} {batch:7}  {tokens or '-':>6}  {loss:.1e}  {gradients:.1e}")


def steps_of(out: Path, ranks: int) -> list[tuple[list[int], float]]:
    """Records, sorted, and loss of each step over all ranks."""
    lines = [(out / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    steps = [[json.loads(line) for line in parts] for parts in zip(*lines, strict=True)]
    return [
        (sorted(r for part in parts for r in part["records"]), sum(part["loss"] for part in parts) / ranks)
        for parts in steps
    ]


def gradients_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / f"gradients-{step}.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_partition_changes_nothing(compute: Any, partition: Partition) -> None:
    reference, out = compute(PARTITIONS[0]), compute(partition)
    steps, expected = steps_of(out, partition[0]), steps_of(reference, 1)
    assert [records for records, _ in steps] == [records for records, _ in expected] and len(steps) == STEPS
    loss_error = max(abs(loss / true - 1) for (_, loss), (_, true) in zip(steps, expected))
    gradient_error = 0.0
    for step in range(1, STEPS + 1):
        true, found = gradients_of(reference, step), gradients_of(out, step)
        assert true.keys() == found.keys()
        whole = torch.stack([value.norm() for value in true.values()]).norm()
        for name, value in true.items():
            # relative to the tensor, or to 1e-3 of all gradients if it is smaller: it would be noise otherwise
            gradient_error = max(gradient_error, float((found[name] - value).norm() / max(value.norm(), 1e-3 * whole)))
    compute.figures[partition] = (loss_error, gradient_error)
    assert loss_error <= TOLERANCE and gradient_error <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero1", "zero2", "zero3"])
def test_gradients_are_accumulated_in_float32(
    tiny_dirs: Dirs, tmp_path: Path, zero: str | None, many: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 micro-batches in bfloat16, against the sum of their gradients in float64."""
    more: dict[str, Any] = {"deepspeed": SCRIPTS / f"{zero}.json", "use_cpu": None} if zero else {}
    batch = {"global_batch_size": 128, "per_device_train_batch_size": 1, "loss_group_size": 128}
    argv = runs.flags(tiny_dirs, many, tmp_path / "run", 2, bf16=True, max_grad_norm=0, **batch, **more)
    runs.finish(argv, tmp_path / "log", observe=str(tmp_path))
    found = gradients_of(tmp_path, 1)
    true: dict[str, torch.Tensor] = torch.load(tmp_path / "sums-1.pt", weights_only=True)
    assert true.keys() == found.keys() and {value.dtype for value in found.values()} == {torch.float32}
    error, whole = (torch.stack([part.norm() for part in parts]).norm() for parts in (
        [found[name].double() - value for name, value in true.items()], list(true.values())
    ))  # fmt: skip
    with capsys.disabled():
        print(f"\n{zero}: error of the accumulation {error / whole:.1e}")
    assert error / whole < 1e-3


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("many") / "mix", samples=128)
