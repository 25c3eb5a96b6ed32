"""Steps are the same records with the same weights for any number of records, ranks and micro-batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from llava.arguments import TrainingArguments
from llava.constants import IGNORE_INDEX
from llava.errors import ConfigError
from llava.train.steps import (
    FILLER,
    MicroBatch,
    StepPlan,
    StepSampler,
    deal_in_order,
    describe_fillers,
    row_weights,
    tokens_of_groups,
    total_steps,
)
from llava.train.train import train
from tests.train import runs
from tests.train.test_deepspeed import LOSS_ATOL, SCRIPTS, WEIGHT_ATOL

Dirs = dict[str, Path]
# records, samples per step, samples per loss group, samples per micro-batch, ranks
CASES = [
    (records, step, group, batch, ranks)
    for records, (step, group), batch, ranks in itertools.product(
        (1, 2, 7, 12, 50, 64), ((1, 1), (8, 4), (12, 4), (32, 8), (32, 32)), (1, 3, 4), (1, 2, 3)
    )
]


def dealt(plan: StepPlan, batch: int, ranks: int) -> list[list[list[MicroBatch]]]:
    """By rank, the micro-batches of each step of an epoch in the order of the file."""
    order = SequentialSampler(range(plan.records))
    samplers = [
        StepSampler(order, plan, lambda records: deal_in_order(records, ranks, batch), rank) for rank in range(ranks)
    ]
    assert {len(sampler) for sampler in samplers} == {plan.steps}
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize(("records", "step_size", "group", "batch", "ranks"), CASES)
def test_a_step_is_the_next_records_in_groups(records: int, step_size: int, group: int, batch: int, ranks: int) -> None:
    plan = StepPlan(records, step_size, group)
    by_rank = dealt(plan, batch, ranks)
    seen: list[int] = []
    for step in range(plan.steps):
        parts = [rank[step] for rank in by_rank]
        assert len({len(part) for part in parts}) == 1, "every rank takes part in each exchange of gradients"
        assert all(FILLER not in part[:-1] for part in parts), "an idle micro-batch more than needed"
        pairs = sorted(pair for part in parts for taken in part if taken != FILLER for pair in zip(*taken))
        first = step * step_size
        assert pairs == [(record, (record - first) // group) for record in range(first, first + len(pairs))]
        assert pairs[-1][1] + 1 == plan.groups(step)
        seen += [record for record, _ in pairs]
    assert seen == list(range(records))


@pytest.mark.parametrize(
    ("batch", "ranks", "idle"), [(16, 8, None), (16, 3, "1 of 9"), (128, 3, "2 of 3"), (7, 1, None)]
)
def test_idle_ranks_are_said(batch: int, ranks: int, idle: str | None) -> None:
    plan = StepPlan(1000, 128, 16)
    text = describe_fillers(plan, ranks, batch)
    assert text is None if idle is None else str(text).startswith(f"{idle} micro-batches of a step are idle")
    if text:
        better = int(text.split("--per_device_train_batch_size ")[1].split()[0])
        assert describe_fillers(plan, ranks, better) is None


def random_step(sizes: list[int], seed: int, group: int) -> tuple[list[tuple[MicroBatch, Any]], list[list[int]]]:
    """Loaded micro-batches of `sizes` rows with random labels, and the supervised tokens of the rows by group."""
    generator = torch.Generator().manual_seed(seed)
    step, by_group, position = [], [], 0
    for size in sizes:
        labels = torch.randint(0, 9, (size, 6), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.6] = IGNORE_INDEX
        places = range(position, position + size)
        step.append((MicroBatch(tuple(places), tuple(place // group for place in places)), {"labels": labels}))
        for place, row in zip(places, labels):
            if place % group == 0:
                by_group.append([])
            by_group[-1].append(int((row[1:] != IGNORE_INDEX).sum()))
        position += size
    return step, by_group


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [3, 1], [2, 5, 1], [7, 7]])
@pytest.mark.parametrize("group", [1, 2, 4, 14])
def test_weights_are_those_of_the_mean_over_groups(sizes: list[int], group: int) -> None:
    step, by_group = random_step(sizes, seed=sum(sizes) + group, group=group)
    step.append((FILLER, {"labels": torch.ones(1, 6, dtype=torch.long)}))
    tokens = tokens_of_groups(step, len(by_group))
    assert tokens.tolist() == [sum(rows) for rows in by_group]
    weights = row_weights(step, tokens, len(by_group), ranks=2)
    assert weights[-1].tolist() == [0]
    expected = [2 / len(by_group) / max(1, sum(rows)) for rows in by_group for _ in rows]
    assert torch.cat(weights[:-1]).tolist() == pytest.approx(expected)


def arguments(tmp_path: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **more)


def test_drop_last_keeps_whole_steps_or_is_refused(tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "dataloader_drop_last": True}
    args = arguments(tmp_path, **more, num_train_epochs=1.5)
    plan = StepPlan.of(50, args)
    assert (plan.steps, total_steps(plan, args)) == (4, 6)
    assert [len(step) for step in dealt(plan, 4, 1)[0]] == [3, 3, 3, 3]
    with pytest.raises(ConfigError, match="drops all 11 records, because a step takes 12"):
        StepPlan.of(11, args)
    assert StepPlan.of(1, arguments(tmp_path, **{**more, "dataloader_drop_last": False})).steps == 1


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
