"""Validation: held-out records, loss, sample answers, and the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.errors import DataError
from llava.train import validation
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import train
from tests.train import runs

Dirs = dict[str, Path]


class Numbers:
    """A data set whose items are their indices."""

    lengths = modality_lengths = tuple(range(100, 120))

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index


def test_split_depends_on_the_seed_alone() -> None:
    numbers: Any = Numbers()
    one, other = validation.split(numbers, 0.2, seed=1), validation.split(numbers, 0.2, seed=1)
    parts: Any = one
    rest, held = ([part[i] for i in range(len(part))] for part in parts)
    assert (len(held), sorted(rest + held)) == (4, list(range(20)))
    assert one[1].indices == other[1].indices != validation.split(numbers, 0.2, seed=2)[1].indices
    assert one[0].lengths == one[0].modality_lengths == [100 + index for index in one[0].indices]
    assert one[0].original(3) == one[0].indices[3]
    with pytest.raises(DataError, match="leaves nothing to train on"):
        validation.split(numbers, 0.99, seed=1)


def test_the_prompt_ends_where_the_last_answer_begins() -> None:
    ids, x = torch.arange(9), -100
    item = {"input_ids": ids, "labels": torch.tensor([x, x, 2, 3, x, x, 6, 7, x])}
    question, expected = validation.split_last_answer(item)
    assert (question.tolist(), expected.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert len(validation.split_last_answer({"input_ids": ids, "labels": torch.full((9,), x)})[1]) == 0


def test_validation_that_never_happens_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    answers = validation.SampleGenerations(trainer=None, count=1)  # type: ignore[arg-type]
    args: Any = SimpleNamespace(evaluation_strategy="steps")
    for steps, every in ((10, 10), (9, 10)):
        state = SimpleNamespace(max_steps=steps, eval_steps=every, is_world_process_zero=True)
        answers.on_train_begin(args, state, None)
    assert [text[:52] for text in caplog.messages] == ["Validation every 10 steps never happens in a run of "]


def test_the_checkpoint_with_the_lowest_loss_is_tracked() -> None:
    state = SimpleNamespace(best_metric=None, best_model_checkpoint=None)
    for loss, name in ((3.0, "a"), (1.0, "b"), (2.0, "c")):
        validation.track_best_checkpoint(state, {"eval_loss": loss}, Path(name))
    validation.track_best_checkpoint(state, None, Path("d"))
    assert (state.best_metric, state.best_model_checkpoint) == (1.0, "b")


def test_validation_at_every_save_does_not_change_training(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    """The held-out records are the training records here, so losses can be compared; a rate of 0 repeats them."""
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    train(runs.flags(tiny_dirs, small_data, plain, 2, **more))
    held = {"eval_data_path": small_data / "finetune.json", "per_device_eval_batch_size": 8, "eval_generations": 2}
    train(runs.flags(tiny_dirs, small_data, seen, 2, **more, **held))
    assert runs.losses(plain) == runs.losses(seen)
    runs.assert_equal_weights(plain, seen)
    lines = [json.loads(line) for line in (seen / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert sorted(losses) == [2, 4] and losses[4] < losses[2]
    answers = [json.loads(line) for line in (seen / "samples.jsonl").read_text().splitlines()]
    assert [(a["step"], a["record"]) for a in answers] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert answers[1]["expected"] == "it is blue" and answers[1]["prompt"].endswith("ASSISTANT:")
    state = json.loads((seen / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-4") and state["best_metric"] == losses[4]


def test_the_best_checkpoint_is_kept_and_held_out_records_are_not_trained(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation loss rises here, so the first checkpoint is the best."""
    monkeypatch.setattr(LLaVATrainer, "evaluate", lambda self, **_: {"eval_loss": float(self.state.global_step)})
    more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train(runs.flags(tiny_dirs, small_data, tmp_path, 1, **more, validation_fraction=0.25))
    assert json.loads((tmp_path / "run.json").read_text())["samples"] == 24
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    runs.assert_equal_weights(tmp_path, tmp_path / "checkpoint-3")


@pytest.mark.parametrize(("stage", "lora"), [(1, False), (2, False), (2, True)])
def test_the_best_weights_can_be_the_final_ones(
    stage: int, lora: bool, tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run resumes in a moved directory."""
    monkeypatch.setattr(LLaVATrainer, "evaluate", lambda self, **_: {"eval_loss": float(self.state.global_step)})
    first, moved = tmp_path / "first", tmp_path / "moved"
    more = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "validation_fraction": 0.25}
    more |= {"load_best_model_at_end": True, "lora_enable": lora, "eval_generations": 0}
    train(runs.flags(tiny_dirs, small_data, first, stage, **more, max_steps=2))
    runs.assert_equal_weights(first, first / "checkpoint-1")
    with pytest.raises(AssertionError, match="differs"):
        runs.assert_equal_weights(first, first / "checkpoint-2")
    if stage == 1 or lora:
        return  # the rest is the same for all
    first.rename(moved)
    train(runs.flags(tiny_dirs, small_data, moved, stage, **more, max_steps=4))
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    runs.assert_equal_weights(moved, moved / "checkpoint-1")


@pytest.mark.slow
def test_validation_and_samples_under_zero3(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    """Each layer is gathered for the evaluation and for every token of the answers; the best weights come back."""
    more = {
        "max_steps": 3,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": None,
    }
    held = {"eval_data_path": small_data / "finetune.json", "per_device_eval_batch_size": 4, "eval_generations": 2}
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "run", 2, **more, **held)
    runs.finish([*argv, "--deepspeed", str(runs.ROOT / "scripts/zero3.json")], tmp_path / "log", ranks=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    answers = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in answers] == [0, 1]
    runs.assert_equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-2")  # and not those of step 3
