"""Packing: every row once, within the budget and balanced, the same on all ranks; sizes equal those of real batches."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, MixtureDataset
from llava.data.mixture import Entry
from llava.errors import ConfigError, DataError
from llava.model.builder import load_pretrained_model
from llava.train import inspect_data
from llava.train.flops import Shape, Trainable, row_flops, step_flops
from llava.train.packing import Packer, deal
from llava.train.packing_report import StepStats, suggested_budget
from llava.train.validation import Subset
from tests.data import zoo
from tests.data.test_dataset import arguments, record, tokenizer

SEVEN = Shape(4096, 11008, 32, 32, 32, 32000, 1024, 4096, 23, 577, 576)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1e18)), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(1, 500),
)
def test_every_row_once_within_the_budget(rows: list[tuple[int, float]], ranks: int, budget: int) -> None:
    tokens, cost = ([row[column] for row in rows] for column in (0, 1))
    dealt = deal(tokens, cost, ranks, budget)  # type: ignore[arg-type]
    assert len(dealt) == ranks and len({len(batches) for batches in dealt}) == 1
    batches = [batch for of_rank in dealt for batch in of_rank]
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) <= 1 or sum(tokens[row] for row in batch) <= budget
        assert [tokens[row] for row in batch] == sorted((tokens[row] for row in batch), reverse=True)
    assert sum(not batch for batch in batches) == max(0, len(batches) - len(rows))
    alone = sum(count > budget for count in tokens)
    least = alone + -(-sum(count for count in tokens if count <= budget) // budget)
    assert len(dealt[0]) >= -(-least // ranks)
    assert dealt == deal(tokens, cost, ranks, budget)  # type: ignore[arg-type]


def test_micro_batches_are_as_few_and_as_even_as_rows_allow() -> None:
    """Rows as in a step of 665,000 conversations: full micro-batches, and ranks that hardly wait for each other."""
    draw = random.Random(0)
    for _ in range(5):
        images = np.array([draw.random() < 0.94 for _ in range(128)])
        tokens = np.array([int(min(2048, draw.lognormvariate(5.3, 0.7))) for _ in range(128)]) + 576 * images
        flops = row_flops(SEVEN, Trainable(), tokens, images.astype(np.int64))
        budget = int(tokens.sum() / 32 / 0.97)  # 32 micro-batches of four rows, to be filled to 97 %
        dealt = deal(tokens.tolist(), flops.tolist(), 8, budget)
        assert len(dealt[0]) == 4
        load = np.array([[flops[batch].sum() for batch in batches] for batches in dealt])  # (ranks, rounds)
        assert load.sum(1).max() < 1.02 * load.sum(1).mean()
        assert load.max(0).sum() < 1.04 * load.mean(0).sum()


@pytest.mark.parametrize(
    ("tokens", "ranks", "budget", "expected"),
    [
        ([5], 2, 10, [[[0]], [[]]]),  # fewer rows than ranks
        ([9, 9, 9], 2, 4, [[[0], [2]], [[1], []]]),  # all of them longer than the budget
        ([20, 3, 4, 3], 2, 10, [[[0]], [[2, 1, 3]]]),
    ],
)
def test_small_steps(tokens: list[int], ranks: int, budget: int, expected: list[list[list[int]]]) -> None:
    assert deal(tokens, list(map(float, tokens)), ranks, budget) == expected


def test_flops_of_rows_are_those_of_the_step() -> None:
    positions, images = np.array([700, 2048, 60]), np.array([1, 0, 0])
    for trainable in (Trainable(), Trainable(language=False), Trainable(adapters=10**7), Trainable(tower=True)):
        rows = [
            step_flops(SEVEN, trainable, tokens=n, length=n, images=k, supervised=0.6 * (n - 576 * k))
            for n, k in zip(positions.tolist(), images.tolist())
        ]
        assert row_flops(SEVEN, trainable, positions, images) == pytest.approx(rows, rel=1e-9)


RECORDS = [
    record("<image>\nWhat color?", "Red, and \ufb01ne \u2026 e\u0301.", image="red.png"),
    record("How are you?", "well " * 300),
    record("<image> or <image>?", "the second " * 90, image=["red.png", "red.png"]),
    {"conversations": []},
    record("<image> " * 9, "red", image=["red.png"] * 9),  # does not fit in 8 ids, see below
    record("Why?\n\n  Because </s> it is so.", "\u732b"),
    record("<image>", "no file", image="absent.png"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (9, 5), "red").save(tmp_path / "red.png")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return tmp_path


def real_sizes(dataset: Any, index: int) -> list[int]:
    batch = DataCollatorForSupervisedDataset(tokenizer(10**6))([dataset[index]])
    return [int(batch["attention_mask"].sum()), int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum())]  # type: ignore[union-attr]


@pytest.mark.parametrize("template", ["v1", "v0", "llama_2", "mpt", "internlm2-chat"])
@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize("limit", [2048, 100])
def test_sizes_are_those_of_collated_batches(folder: Path, template: str, start_end: bool, limit: int) -> None:
    """With truncation, several images, text only, and records with bad text."""
    args = arguments(folder / "data.json", mm_use_im_start_end=start_end, on_bad_sample="skip")
    dataset = LazySupervisedDataset(args.data_path, tokenizer(limit), args, template)
    good = [0, 1, 2, 3, 4, 5]  # record 3 is replaced by record 5, which has no image either
    assert dataset.sizes(good).tolist() == [real_sizes(dataset, index) for index in good]
    assert dataset.sizes([3]).tolist() == dataset.sizes([5]).tolist()
    assert dataset.sizes([6])[0, 1] == 1  # its text is good


@pytest.mark.parametrize("name", ["llama3-like", "llama-fast", "gpt2-slow", "llama-legacy"])
def test_sizes_with_other_tokenizers(folder: Path, name: str) -> None:
    args = arguments(folder / "data.json", on_bad_sample="skip")
    dataset = LazySupervisedDataset(args.data_path, zoo.make(name), args, "mpt")
    good = [0, 1, 2, 5]
    assert dataset.sizes(good).tolist() == [real_sizes(dataset, index) for index in good]


def test_sizes_do_not_depend_on_what_this_process_has_seen(folder: Path) -> None:
    """Otherwise ranks would deal differently: a bad image is found by the rank that opens it."""
    args = arguments(folder / "data.json", on_bad_sample="skip")
    fresh, used = (LazySupervisedDataset(args.data_path, tokenizer(), args, "v1") for _ in range(2))
    for index in range(len(used)):
        used[index]
    assert used._flags[0].any()
    everything = range(len(RECORDS))
    assert used.sizes(everything).tolist() == fresh.sizes(everything).tolist()


def test_a_bad_text_ends_the_measurement_like_loading(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps([RECORDS[0], RECORDS[4]]))
    args = arguments(folder / "data.json")
    dataset = LazySupervisedDataset(args.data_path, tokenizer(8), args, "v1")
    messages = []
    for fails in (lambda: dataset.sizes([1]), lambda: dataset[1]):
        with pytest.raises(DataError, match="record 1: 9 images do not fit into 8 ids") as caught:
            fails()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_record_is_measured_once_for_all_repeats_and_epochs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "good.json").write_text(json.dumps([RECORDS[0], RECORDS[1]]))
    (folder / "text.json").write_text(json.dumps([RECORDS[5]]))
    entries = [Entry("a", str(folder / "good.json"), str(folder), 3), Entry("b", str(folder / "text.json"), "", 2)]
    args: Any = arguments(folder / "good.json")
    mixture = MixtureDataset(entries, tokenizer(), args, get_template("v1"))
    measured: list[int] = []
    for part in mixture.parts.values():
        size = part._size
        monkeypatch.setattr(part, "_size", lambda index, size=size: measured.append(index) or size(index))
    order = [7, 0, 5, 3, 2, 6, 4, 1]
    for _ in range(2):
        assert mixture.sizes(order).tolist() == [real_sizes(mixture, index) for index in order]
    assert sorted(measured) == [0, 0, 1]
    assert Subset(mixture, [4, 6]).sizes([1, 0]).tolist() == [real_sizes(mixture, index) for index in (6, 4)]


class Sizes:
    """A data set of given sizes; `asked` are the indices."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.values = np.array(sizes, np.int32)

    def sizes(self, indices: Any) -> Any:
        return self.values[indices]


def test_packer_deals_indices_and_names_the_first_long_record(caplog: pytest.LogCaptureFixture) -> None:
    packer = Packer(Sizes([(30, 1), (100, 0), (20, 0), (2000, 1), (60, 0)]), SEVEN, Trainable(), 576, 2, 1000)
    with caplog.at_level(logging.WARNING):
        first, second = packer.deal([4, 3, 2, 1, 0]), packer.deal([3, 1])
    assert first == [[[3]], [[0, 1, 4, 2]]]
    assert second == [[[3]], [[1]]]
    assert packer.longer == 2
    assert caplog.text.count("Record 3 has 2575 tokens, more than --micro_batch_tokens 1000") == 1
    assert packer.measure([0])[0].tolist() == [605]


def test_a_model_computes_the_tokens_that_were_measured(folder: Path, tiny_dirs: dict[str, Path]) -> None:
    made, model, processor, _ = load_pretrained_model(tiny_dirs["chat"], device="cpu")
    made.model_max_length = 150
    args = arguments(folder / "data.json", on_bad_sample="skip", image_processor=processor)
    dataset = LazySupervisedDataset(args.data_path, made, args, "v1")
    packer = Packer.of(dataset, model, ranks=2, budget=2000)
    rows = [1, 2, 0, 5]
    batch: Any = DataCollatorForSupervisedDataset(made)([dataset[index] for index in rows])
    lengths = model.pack_inputs_and_labels(**batch)[1]
    assert packer.measure(rows)[0].tolist() == lengths
    flops = packer.measure(rows)[1]
    assert flops.argmax() == 1 and flops.min() > 0
    with pytest.raises(ConfigError, match="--micro_batch_tokens needs a language model without padding"):
        Packer.of(dataset, SimpleNamespace(supports_packing=False), 1, 1)  # type: ignore[arg-type]


def test_statistics_of_a_step() -> None:
    """Two ranks; attention pads 90 to 100 tokens, and 10 alone."""
    tokens, flops = np.array([100, 90, 10, 50]), np.array([4.0, 3.0, 1.0, 2.0])
    stats = StepStats.of([[[0, 1]], [[2], [3]]], tokens, flops, 200)
    assert (stats.micro_batches, stats.largest, stats.fill) == (2, 190, 250 / 800)
    assert stats.attention == pytest.approx((100**2 + 90**2 + 10**2 + 50**2) / (2 * 100**2 + 10**2 + 50**2))
    assert stats.imbalance == pytest.approx(0.4)  # 7 FLOPs against a mean of 5
    assert stats.waiting == pytest.approx((7 + 2) / 5 - 1)


def test_a_budget_is_suggested_that_is_fuller() -> None:
    draw = np.random.default_rng(0)
    steps = [draw.integers(600, 1100, 128) for _ in range(5)]  # 108,800 tokens on average
    better, fill = suggested_budget([(tokens, tokens * 1.0) for tokens in steps], 8, 8_000)
    assert 6_800 <= better <= 7_200 and fill > 0.95


def in_file(folder: Path, records: list[Any]) -> str:
    (folder / "many.json").write_text(json.dumps(records))
    return str(folder / "many.json")


def test_inspect_data_prints_fill_and_balance(
    folder: Path, tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    words = [record("<image>\nWhat?", "red " * draw.randint(1, 60), image="absent.png") for _ in range(56)]
    words += [record("What?", "red " * draw.randint(50, 200)) for _ in range(8)]
    argv = [in_file(folder, words), "--model", str(tiny_dirs["chat"]), "--micro_batch_tokens", "450"]
    argv += ["--global_batch_size", "16", "--ranks", "2", "--steps", "3"]
    assert inspect_data.main(argv) == 0
    output = capsys.readouterr().out
    assert "3 steps of 16 records on 2 ranks" in output
    row = next(line for line in output.splitlines() if "fill of the budget" in line)
    assert 0.5 < float(row.split()[-3]) / 100 <= 1 and row.endswith("-")
    assert re.search("packed in 450 tokens +8 consecutive rows", output)
    assert inspect_data.main([*argv, "--group_by_modality_length", "--loss_group_size", "4"]) == 0
    assert "4 consecutive rows" in capsys.readouterr().out
    assert inspect_data.main([*argv, "--micro_batch_tokens", "100"]) == 0
    assert "records are longer than the budget; each is a micro-batch by itself" in capsys.readouterr().out
    for flag, value, why in (
        ("loss_group_size", "5", "--loss_group_size must divide --global_batch_size 16, got 5."),
        ("ranks", "0", "--ranks must be at least 1, got 0."),
    ):
        assert inspect_data.main([*argv, f"--{flag}", value]) == 2
        assert why in capsys.readouterr().err
