"""One rank with text only and one with images only in every step: no hang, no gradient from zero images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model.builder import load_pretrained_model
from tests.train import runs
from tests.train.test_deepspeed import SCRIPTS

Dirs = dict[str, Path]
STEPS = 20
CASES = [("zero1", False, False), ("zero1", True, True), ("zero2", False, True), ("zero2", True, False)]
CASES += [("zero3", checkpointing, tower) for checkpointing in (False, True) for tower in (False, True)]


@pytest.fixture(scope="module")
def by_turns(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records for two ranks that take them in turn: text, image, text, image …"""
    records = json.loads((small_data / "finetune.json").read_text())
    text = [record for record in records if "image" not in record]
    image = [record for record in records if "image" in record]
    path = tmp_path_factory.mktemp("turns") / "data.json"
    path.write_text(json.dumps([(text, image)[i % 2][i // 2 % 8] for i in range(2 * STEPS)]))
    return path


@pytest.fixture(scope="module")
def alone(tiny_dirs: Dirs, small_data: Path, by_turns: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same steps by one process that accumulates two records."""
    root = tmp_path_factory.mktemp("alone")

    def run(tower: bool) -> Path:
        out = root / str(tower)
        if not out.exists():
            more = {"gradient_accumulation_steps": 2, "max_grad_norm": 0, "unfreeze_mm_vision_tower": tower}
            argv = runs.flags(tiny_dirs, small_data, out, 2, data_path=by_turns, per_device_train_batch_size=1, **more)
            runs.finish(argv, root / "log", in_order=True)
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "checkpointing", "tower"), CASES)
def test_text_on_one_rank_and_images_on_the_other(
    tiny_dirs: Dirs,
    small_data: Path,
    by_turns: Path,
    alone: Any,
    tmp_path: Path,
    zero: str,
    checkpointing: bool,
    tower: bool,
) -> None:
    more = {"gradient_checkpointing": checkpointing, "unfreeze_mm_vision_tower": tower, "use_cpu": None}
    out = tmp_path / "run"
    argv = runs.flags(tiny_dirs, small_data, out, 2, data_path=by_turns, per_device_train_batch_size=1, **more)
    runs.finish([*argv, "--deepspeed", str(SCRIPTS / f"{zero}.json")], tmp_path / "log", ranks=2, in_order=True)
    assert len(runs.losses(out)) == STEPS
    assert runs.losses(out) == pytest.approx(runs.losses(alone(tower)), abs=2e-4)
    runs.assert_equal_weights(out, alone(tower), atol=2e-5)


def test_zero_images_change_neither_loss_nor_gradients(tiny_dirs: Dirs) -> None:
    """Text with a zero image, as on the text-only rank, against text alone."""
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1].train()
    ids = torch.tensor([[1, 5, 9, 11, 20, 7]])
    seen = []
    for images in (None, torch.zeros(1, 3, 56, 56)):
        model.requires_grad_(True)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, images=images).loss
        loss.backward()
        seen.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (with_zeros, and_theirs) = seen
    assert torch.equal(loss, with_zeros)
    assert all(torch.equal(gradients[name], and_theirs[name]) for name in gradients)
    extra = {name for name in and_theirs if name not in gradients}
    assert extra and all("mm_projector" in name or "vision_tower" in name for name in extra)
    assert all(not and_theirs[name].any() for name in extra)
