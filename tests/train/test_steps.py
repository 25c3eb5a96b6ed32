"""Every record once an epoch, and the true mean in every step, for any number of records, ranks and micro-batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import SequentialSampler

from llava.arguments import TrainingArguments
from llava.errors import ConfigError
from llava.train.steps import EpochPlan, StepBatchSampler, total_steps
from llava.train.train import train
from tests.train import runs
from tests.train.test_deepspeed import LOSS_ATOL, SCRIPTS, WEIGHT_ATOL

Dirs = dict[str, Path]
CASES = list(itertools.product((1, 2, 7, 12, 50, 64), (1, 4), (1, 2, 32), (1, 2, 3)))


def dealt(records: int, batch: int, accumulation: int, ranks: int) -> tuple[EpochPlan, list[list[tuple[float, Any]]]]:
    """The plan of an epoch, and by rank the weighted micro-batches."""
    plan = EpochPlan(-(-records // batch), accumulation, ranks)
    samplers = [StepBatchSampler(SequentialSampler(range(records)), batch, plan, rank) for rank in range(ranks)]
    assert {len(sampler) for sampler in samplers} == {plan.steps * accumulation}
    return plan, [
        [(plan.weight(index, rank), tuple(drawn)) for index, drawn in enumerate(sampler)]
        for rank, sampler in enumerate(samplers)
    ]


@pytest.mark.parametrize(("records", "batch", "accumulation", "ranks"), CASES)
def test_an_epoch_is_every_record_once_in_steps_that_are_means(
    records: int, batch: int, accumulation: int, ranks: int
) -> None:
    plan, by_rank = dealt(records, batch, accumulation, ranks)
    seen: list[int] = []
    for step in range(plan.steps):
        places = range(step * accumulation, (step + 1) * accumulation)
        taken = [by_rank[rank][index] for index in places for rank in range(ranks)]
        weights = [weight for weight, _ in taken if weight]
        assert len(set(weights)) == 1 and sum(weights) == pytest.approx(accumulation * ranks)
        seen += [record for weight, drawn in taken if weight for record in drawn]
        assert not plan.is_idle(places[-1]), "without a backward pass in it, ranks would not exchange gradients"
        idle = [index for index in places if plan.is_idle(index)]
        assert all(weight == 0 for index in idle for weight, _ in (by_rank[rank][index] for rank in range(ranks)))
    assert seen == list(range(records))


def test_another_number_of_ranks_takes_the_same_records_in_each_step() -> None:
    for records in (50, 64, 65):
        steps = []
        for batch, accumulation, ranks in ((8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)):
            plan, by_rank = dealt(records, batch, accumulation, ranks)
            places = [range(s * accumulation, (s + 1) * accumulation) for s in range(plan.steps)]
            steps.append([sorted(r for i in p for rank in by_rank for r in rank[i][1] if rank[i][0]) for p in places])
        assert all(other == steps[0] for other in steps)


def arguments(tmp_path: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **more)


def test_drop_last_keeps_whole_steps_or_is_refused(tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "dataloader_drop_last": True}
    args = arguments(tmp_path, **more, num_train_epochs=1.5)
    plan = EpochPlan.of(50, args)
    assert (plan.batches, plan.steps, total_steps(plan, args)) == (12, 4, 6)
    with pytest.raises(ConfigError, match="drops all 11 records, because a step takes 12"):
        EpochPlan.of(11, args)
    assert EpochPlan.of(1, arguments(tmp_path, **{**more, "dataloader_drop_last": False})).steps == 1


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("fifty") / "mix", samples=50)


def test_drop_last_with_too_little_data_is_one_sentence_before_the_model_is_read(fifty: Path, tmp_path: Path) -> None:
    dirs = {"base": tmp_path / "nowhere", "tower": tmp_path / "nowhere"}
    entry = {"annotation": str(fifty / "finetune.json"), "root": str(fifty / "images"), "repeat_time": 2}
    (tmp_path / "mixture.json").write_text(json.dumps({"mine": entry}))
    more = {"dataloader_drop_last": True, "global_batch_size": 128}
    with pytest.raises(ConfigError, match=r"drops all 50 records, because a step takes 128; drop the flag"):
        train(runs.flags(dirs, fifty, tmp_path / "run", 2, **more))
    mixture = {"data_path": None, "image_folder": None, "meta_path": tmp_path / "mixture.json"}
    with pytest.raises(ConfigError, match="drops all 100 records"):
        train(runs.flags(dirs, fifty, tmp_path / "run", 2, **more, **mixture))


def test_small_data_under_accumulation_has_the_true_loss(tiny_dirs: Dirs, fifty: Path, tmp_path: Path) -> None:
    """50 records in 13 micro-batches of a step of 32: three epochs are three steps with the loss of all records."""
    more = {"num_train_epochs": 3, "learning_rate": 0}
    small, whole = tmp_path / "small", tmp_path / "whole"
    train(runs.flags(tiny_dirs, fifty, small, 2, **more, gradient_accumulation_steps=32))
    train(runs.flags(tiny_dirs, fifty, whole, 2, **more, per_device_train_batch_size=50))
    assert runs.losses(small) == pytest.approx(runs.losses(whole), abs=0.02)
    assert runs.losses(small)[0] > 4
    assert [entry["epoch"] for entry in runs.history(small)] == [1, 2, 3]
    for key in ("supervised_tokens", "learning_rate"):
        assert [entry[key] for entry in runs.history(small)] == [entry[key] for entry in runs.history(whole)]


def test_gradients_of_an_incomplete_step_are_the_mean(tiny_dirs: Dirs, fifty: Path, tmp_path: Path) -> None:
    """25 micro-batches in steps of 32, against steps of 25."""
    more = {"num_train_epochs": 3, "per_device_train_batch_size": 2}
    for name, accumulation in (("small", 32), ("whole", 25)):
        train(runs.flags(tiny_dirs, fifty, tmp_path / name, 2, **more, gradient_accumulation_steps=accumulation))
    assert runs.losses(tmp_path / "small") == pytest.approx(runs.losses(tmp_path / "whole"), abs=LOSS_ATOL)
    runs.assert_equal_weights(tmp_path / "small", tmp_path / "whole", atol=WEIGHT_ATOL)


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("nine") / "mix", samples=9)


@pytest.fixture(scope="module")
def one_process(tiny_dirs: Dirs, nine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of 8 and 1 of nine records; not clipped, as the ZeRO files do not clip."""
    out = tmp_path_factory.mktemp("single") / "run"
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": 2}
    train(runs.flags(tiny_dirs, nine, out, 2, max_grad_norm=0, **more))
    assert [entry["epoch"] for entry in runs.history(out)] == pytest.approx([0.5, 1, 1.5, 2])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_two_ranks_end_an_epoch_with_one_record(
    tiny_dirs: Dirs, nine: Path, tmp_path: Path, one_process: Path, zero: str | None
) -> None:
    """The ninth record is alone in its step: one rank has it, the other a filler."""
    more: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    if zero:
        more |= {"deepspeed": SCRIPTS / f"{zero}.json", "use_cpu": None}
    out = tmp_path / "run"
    runs.finish(runs.flags(tiny_dirs, nine, out, 2, max_grad_norm=0, **more), tmp_path / "log", ranks=2)
    assert runs.losses(out) == pytest.approx(runs.losses(one_process), abs=LOSS_ATOL)
    for key in ("supervised_tokens", "learning_rate", "epoch"):
        assert [e[key] for e in runs.history(out)] == pytest.approx([e[key] for e in runs.history(one_process)])
    runs.assert_equal_weights(out, one_process, atol=WEIGHT_ATOL)


@pytest.mark.slow
def test_more_ranks_than_records(tiny_dirs: Dirs, tmp_path: Path) -> None:
    data = runs.make_data(tmp_path / "one", samples=1)
    for name, ranks in (("one", 1), ("two", 2)):
        argv = runs.flags(tiny_dirs, data, tmp_path / name, 2, num_train_epochs=2)
        runs.finish(argv, tmp_path / "log", ranks=ranks)
    assert runs.losses(tmp_path / "two") == pytest.approx(runs.losses(tmp_path / "one"), abs=LOSS_ATOL)
    runs.assert_equal_weights(tmp_path / "two", tmp_path / "one", atol=WEIGHT_ATOL)
