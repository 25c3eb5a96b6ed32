"""The training program on a simulated GPU: losses and checkpoint equal those of a CPU run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from llava.train.train import train
from tests import devices
from tests.train import runs


def forget_devices() -> None:
    """Accelerate keeps the device of the first run in a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_devices()
    yield
    forget_devices()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data") / "mix", samples=8, text_rows=(0, 4))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run(tiny_dirs: dict[str, Path], data: Path, tmp_path: Path, stage: int) -> None:
    def run(name: str, **more: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        out = tmp_path / name
        train(runs.flags(tiny_dirs, data, out, stage, max_steps=3, **more))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        file = out / "mm_projector.bin"
        weights = torch.load(file, weights_only=True) if stage == 1 else load_file(out / "model.safetensors")
        return [line["loss"] for line in lines if "loss" in line], weights

    losses, weights = run("cpu")
    forget_devices()
    with devices.simulated_cuda() as card, card.record() as events:
        found, tensors = run("cuda", use_cpu=None)
    assert len(losses) == 3 and found == pytest.approx(losses, abs=2e-4)
    assert tensors.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            tensors[name], value, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert events.downloads and {type(tensor) for tensor in tensors.values()} == {torch.Tensor}
