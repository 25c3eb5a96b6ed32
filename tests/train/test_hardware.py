"""Runs that are killed with SIGKILL on one kind of hardware and resumed on another equal an uninterrupted one.

The suite takes the cells of `SUITE`; `LLAVA_RESUME_MATRIX=all` takes all of `MATRIX`. Each prints its table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llava.errors import CheckpointError
from llava.train import optimizer_state
from llava.train.train import train
from tests.train import runs
from tests.train.test_deepspeed import LOSS_ATOL, SCRIPTS, WEIGHT_ATOL

Dirs = dict[str, Path]
STEPS, ROWS, SAVED = 8, 4, 2


class Place(NamedTuple):
    """Hardware of a run."""

    ranks: int
    zero: str  # or "ddp"

    def __str__(self) -> str:
        return f"{self.ranks} {self.zero}"


class Cell(NamedTuple):
    saves: str
    before: Place
    after: Place

    def __str__(self) -> str:
        return f"{self.saves}: {self.before} -> {self.after}"


ONE, TWO_2, TWO_3 = Place(1, "ddp"), Place(2, "zero2"), Place(2, "zero3")
RANKS = ((1, 2), (2, 1), (2, 4))
KINDS = ("ddp", "zero2", "zero3")
BETWEEN = ((ONE, TWO_2), (ONE, TWO_3), (TWO_2, ONE), (TWO_3, ONE), (TWO_2, TWO_3), (TWO_3, TWO_2))
MATRIX = [Cell(s, Place(b, k), Place(a, k)) for s in ("full", "lora") for k in KINDS for b, a in RANKS]
MATRIX += [Cell(s, *pair) for s in ("full", "lora", "projector") for pair in BETWEEN]
# Without DeepSpeed, test_resume.py changes the number of ranks.
SUITE = [
    *(Cell("full", *pair) for pair in ((ONE, TWO_2), (TWO_3, ONE), (TWO_2, TWO_3))),
    Cell("full", TWO_3, Place(4, "zero3")),
    Cell("lora", TWO_3, Place(1, "zero3")),
    Cell("projector", ONE, TWO_3),
]
CELLS = MATRIX if os.environ.get("LLAVA_RESUME_MATRIX") == "all" else SUITE


def flags(dirs: Dirs, data: Path, out: Path, saves: str, place: Place, **more: Any) -> list[str]:
    """The same steps everywhere; not clipped, as the ZeRO files do not clip."""
    step = {"global_batch_size": ROWS, "loss_group_size": ROWS, "max_steps": STEPS}
    values: dict[str, Any] = {"per_device_train_batch_size": ROWS // place.ranks, **step}
    if place.zero == "ddp":
        values["max_grad_norm"] = 0
    else:
        values |= {"deepspeed": SCRIPTS / f"{place.zero}.json", "use_cpu": None}
    if saves == "lora":
        values |= {"lora_enable": True, "lora_r": 4, "lora_dropout": 0}
    return runs.flags(dirs, data, out, 1 if saves == "projector" else 2, **{**values, **more})


@pytest.fixture(scope="module")
def whole(tiny_dirs: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output directory of an uninterrupted run in one process."""
    root = tmp_path_factory.mktemp("whole")

    def run(saves: str) -> Path:
        out = root / saves
        if not out.exists():
            train(flags(tiny_dirs, small_data, out, saves, ONE))
        return out

    return run


@pytest.fixture(scope="module")
def killed(tiny_dirs: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Place], Path]:
    """The output directory of a run that was killed in the middle."""
    root = tmp_path_factory.mktemp("killed")

    def run(saves: str, place: Place) -> Path:
        out = root / f"{saves} {place}"
        if not out.exists():
            saving = {"save_strategy": "steps", "save_steps": SAVED}
            argv = flags(tiny_dirs, small_data, out, saves, place, **saving)
            runs.kill_at(argv, out, SAVED + 1, root / f"{out.name}.log", ranks=place.ranks)
        return out

    return run


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    """Results by cell, printed when all are done."""
    rows: dict[str, str] = {}
    yield rows
    print("\n\n" + "\n".join(f"{cell:<32}{result}" for cell, result in rows.items()))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_killed_run_continues_on_other_hardware(
    tiny_dirs: Dirs,
    small_data: Path,
    tmp_path: Path,
    whole: Callable[[str], Path],
    killed: Callable[[str, Place], Path],
    table: dict[str, str],
    cell: Cell,
) -> None:
    source, out = killed(cell.saves, cell.before), tmp_path / "run"
    table[str(cell)] = "failed"
    shutil.copytree(source, out)
    log = tmp_path / "log"
    runs.finish(flags(tiny_dirs, small_data, out, cell.saves, cell.after), log, ranks=cell.after.ranks)
    text, expected = log.read_text(), whole(cell.saves)
    (line,) = [line for line in text.splitlines() if "Resuming from" in line]
    converts = not cell.before.zero == cell.after.zero == "ddp"
    assert text.count("Converting the optimizer state of a run") == converts, text
    runs_of = {"ddp": "without DeepSpeed", "zero2": "under ZeRO-2", "zero3": "under ZeRO-3"}
    for place in (cell.before, cell.after) if converts else ():
        assert f"{runs_of[place.zero]} on {place.ranks} process" in text
    left, right = runs.history(out), runs.history(expected)
    for key in ("learning_rate", "supervised_tokens"):
        assert [entry[key] for entry in left] == [entry[key] for entry in right]
    assert runs.losses(out) == pytest.approx(runs.losses(expected), abs=LOSS_ATOL)
    runs.assert_equal_weights(out, expected, atol=WEIGHT_ATOL)
    loss = max(abs(a - b) for a, b in zip(runs.losses(out), runs.losses(expected), strict=True))
    one, other = runs.tensors(out), runs.tensors(expected)
    weight = max(float((one[name] - other[name]).abs().max()) for name in one)
    table[str(cell)] = f"from step {line.rsplit('-', 1)[1].rstrip('.')}: losses {loss:.0e}, weights {weight:.0e}"


@pytest.mark.slow
def test_a_zero_file_with_its_own_optimizer_and_schedule(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    """It makes one parameter group, and its schedule is in the shards; without it, the run is refused."""
    config = json.loads((SCRIPTS / "zero3_offload.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        del config["zero_optimization"][part]
    config["optimizer"]["params"]["torch_adam"] = True
    (tmp_path / "own.json").write_text(json.dumps(config))
    saving = {"deepspeed": tmp_path / "own.json", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 4}
    expected, out, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    runs.finish(flags(tiny_dirs, small_data, expected, "full", TWO_3, **saving), log, ranks=2)
    shutil.copytree(expected / "checkpoint-4", out / "checkpoint-4")
    argv = flags(tiny_dirs, small_data, out, "full", Place(1, "zero3"), **saving)
    runs.finish(argv, log)
    assert runs.losses(out) == pytest.approx(runs.losses(expected), abs=LOSS_ATOL)
    assert [e["learning_rate"] for e in runs.history(out)] == [e["learning_rate"] for e in runs.history(expected)]
    runs.assert_equal_weights(out, expected, atol=WEIGHT_ATOL)
    with pytest.raises(CheckpointError, match='learning rate of that run follows the "scheduler" entry'):
        train(flags(tiny_dirs, small_data, out, "full", ONE))


class _Member:
    """What Python 3.11.0 to 3.11.3 pickle for a member of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self.call = getattr, (kind, name)

    def __reduce__(self) -> Any:
        return self.call


def test_states_with_members_by_name_are_read_and_other_attributes_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"zero_stage": _Member(ZeroStageEnum, "gradients")}, tmp_path / "known.pt")
    assert optimizer_state._load(tmp_path / "known.pt") == {"zero_stage": ZeroStageEnum.gradients}
    torch.save({"zero_stage": _Member(DynamicLossScaler, "__init__")}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        optimizer_state._load(tmp_path / "other.pt")
