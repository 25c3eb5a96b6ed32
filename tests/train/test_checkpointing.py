"""Checkpoint selection, verification of saves, disk space, random state, and the projector file."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llava.errors import CheckpointError, ConfigError, TrainingError
from llava.model.checkpoint import load_bin
from llava.model.saving import savable_generation_config
from llava.train import checkpointing
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import train


def make_checkpoint(output_dir: Path, step: int) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 3)}, directory / "mm_projector.bin")
    torch.save({}, directory / "optimizer.pt")
    torch.save(checkpointing.random_state(), directory / "rng_state.pth")
    return directory


def test_latest_checkpoint_is_chosen_by_step(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    assert checkpointing.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpointing.latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json is missing"),
        ("trainer_state.json", "trainer_state.json is missing"),
        ("optimizer.pt", "no optimizer state"),
        ("rng_state.pth", "no random state"),
        ("mm_projector.bin", "weights"),
    ],
)
def test_incomplete_checkpoints_are_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, message: str
) -> None:
    make_checkpoint(tmp_path, 1)
    newest = make_checkpoint(tmp_path, 2)
    (newest / name).unlink()
    assert checkpointing.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert str(newest) in caplog.text and message in caplog.text
    (newest / name).touch()
    caplog.clear()
    assert checkpointing.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert f"{name} is empty" in caplog.text


def test_unfinished_checkpoints_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "tmp-checkpoint-2")
    assert checkpointing.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "tmp-checkpoint-2" in caplog.text


def test_a_deepspeed_checkpoint_needs_its_folder(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, 3)
    (directory / "optimizer.pt").unlink()
    (directory / "latest").write_text("global_step3")
    assert "DeepSpeed folder" in str(checkpointing.incomplete(directory))
    (directory / "global_step3").mkdir()
    assert checkpointing.incomplete(directory) is None


def test_a_requested_checkpoint_is_checked(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 1)
    assert checkpointing.checkpoint_to_resume(tmp_path, str(good)) == good
    assert checkpointing.checkpoint_to_resume(tmp_path, None) == good
    assert checkpointing.checkpoint_to_resume(tmp_path, "False") is None
    (good / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="optimizer"):
        checkpointing.checkpoint_to_resume(tmp_path, str(good))
    with pytest.raises(CheckpointError, match="must be a checkpoint directory, got"):
        checkpointing.checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-7"))


def test_random_state_is_restored_from_a_file_without_pickled_objects(tmp_path: Path) -> None:
    torch.save(checkpointing.random_state(), tmp_path / "rng.pth")
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    checkpointing.set_random_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn


def test_a_save_is_verified(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    expected = {"a": (2, 3), "b": (4,)}
    checkpointing.verify(tmp_path, expected)
    for wrong in ({**expected, "c": (1,)}, {**expected, "b": (5,)}):
        with pytest.raises(CheckpointError, match="not those of the model"):
            checkpointing.verify(tmp_path, wrong)
    save_file({**tensors, "a": torch.ones(0)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="empty"):
        checkpointing.verify(tmp_path, {"b": (4,)})


def test_unwritable_output_dir_fails_before_loading(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot write .*/file/run: Not a directory"):
        train(["--use_cpu", "True", "--data_path", "none.json", "--output_dir", str(tmp_path / "file/run")])


def test_checkpoints_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "rest": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpointing.check_weights(tmp_path, {"a": (2, 3)})
    with pytest.raises(CheckpointError, match="run with another model: b is missing.*--output_dir"):
        checkpointing.check_weights(tmp_path, {"a": (2, 3), "b": (1,)})
    with pytest.raises(CheckpointError, match=r"a is \(2, 3\) and not \(3, 2\)"):
        checkpointing.check_weights(tmp_path, {"a": (3, 2)})


def test_a_projector_file_must_fit_by_name_and_shape() -> None:
    model = torch.nn.ModuleDict({"mm_projector": torch.nn.Linear(3, 2)})
    parameters = dict(model.named_parameters())
    checkpointing.copy_tensors(parameters, {"mm_projector.weight": torch.full((2, 3), 7.0)})
    assert float(model["mm_projector"].weight.detach().sum()) == 42
    with pytest.raises(CheckpointError, match="not in this model: mm_projector.scale"):
        checkpointing.copy_tensors(parameters, {"mm_projector.scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"\(3, 2\)"):
        checkpointing.copy_tensors(parameters, {"mm_projector.weight": torch.ones(3, 2)})


def test_final_projector_path_of_a_checkpoint_directory(tmp_path: Path) -> None:
    assert checkpointing.projector_file(tmp_path / "run", final=True) == tmp_path / "run" / "mm_projector.bin"
    folder = tmp_path / "checkpoint-5"
    assert checkpointing.projector_file(folder, final=False) == folder / "mm_projector.bin"
    assert checkpointing.projector_file(folder, final=True) == tmp_path / "mm_projector" / "checkpoint-5.bin"


def test_code_in_a_projector_file_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.0.weight": Attack()}, path)
    with pytest.raises(CheckpointError):
        load_bin(path)
    assert not (tmp_path / "owned").exists()


def test_insufficient_disk_space_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**30))
    checkpointing.check_disk_space(tmp_path, 2**30, 2**30, None)
    with pytest.raises(TrainingError, match=r"10\.0 GiB free"):
        checkpointing.check_disk_space(tmp_path, 6 * 2**30, 5 * 2**30, 1)


def test_disk_that_will_fill_up_logs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**30))
    checkpointing.check_disk_space(tmp_path, 2**30, 4 * 2**30, 3)
    assert "10.0 GiB free" in caplog.text


def test_dry_run_fails_for_an_unsavable_model(tmp_path: Path) -> None:
    class Config:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    model = SimpleNamespace(config=Config())
    with pytest.raises(TrainingError, match="No space left"):
        checkpointing.dry_run(tmp_path, model, None)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_fails_when_data_reads_back_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = SimpleNamespace(save_pretrained=lambda directory: None)
    checkpointing.dry_run(tmp_path, SimpleNamespace(config=saved), saved)
    monkeypatch.setattr(checkpointing, "load_bin", lambda path: {"probe": torch.zeros(2)})
    with pytest.raises(TrainingError, match="reads back differently"):
        checkpointing.dry_run(tmp_path, SimpleNamespace(config=saved), saved)


@pytest.mark.parametrize(("saved", "visible"), [(4, 2), (2, 4), (0, 2), (2, 0), (3, 3)])
def test_random_state_is_restored_on_common_devices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, saved: int, visible: int
) -> None:
    restored: dict[int, Any] = {}
    state = checkpointing.random_state()
    if saved:
        state["cuda"] = [torch.tensor([number], dtype=torch.uint8) for number in range(saved)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", lambda value, device: restored.update({device: int(value)}))
    checkpointing.set_random_state(state)
    both = min(saved, visible)
    assert restored == dict(zip(range(both), range(both)))
    assert caplog.text.count("will not reproduce") == (saved != visible)


def test_damaged_random_state_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rng_state.pth").write_bytes(b"not a state")
    trainer: Any = SimpleNamespace(_rng_file=lambda directory: tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError, match=r"rng_state.pth cannot be read as random state"):
        LLaVATrainer._load_rng_state(trainer, str(tmp_path))


def test_sampling_parameters_of_a_greedy_configuration_are_saved() -> None:
    from transformers import GenerationConfig

    greedy = GenerationConfig(do_sample=False)
    greedy.temperature, greedy.top_p = 0.9, 0.6
    saved = savable_generation_config(greedy)
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    assert not greedy.do_sample
    for unchanged in (GenerationConfig(do_sample=True, temperature=0.9), GenerationConfig(do_sample=False)):
        assert savable_generation_config(unchanged) is unchanged
