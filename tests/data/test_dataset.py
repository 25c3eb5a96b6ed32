"""Dataset and collator: published batches, images in row order, bad records reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlamaTokenizer

from llava import conversation
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, make_supervised_data_module
from llava.errors import ConfigError, DataError, ImageError, TemplateError
from tests.data import zoo
from tests.test_images import encoded, noise, processor

Make = Callable[..., LazySupervisedDataset]


def record(question: str, answer: str = "yes", image: Any = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def arguments(data_path: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "data_path": str(data_path),
            "image_folder": str(data_path.parent),
            "image_aspect_ratio": "pad",
            "is_multimodal": True,
            "image_processor": processor(28),
            "mm_use_im_start_end": False,
            "on_bad_sample": "error",
            **changes,
        }
    )


def tokenizer(limit: int = 2048) -> Any:
    made = LlamaTokenizer(zoo.sentencepiece_file(), legacy=False, model_max_length=limit)
    made.pad_token = made.unk_token
    return made


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A dataset of the given records; red.png, green.png and blue.png exist."""
    for name in ("red", "green", "blue"):
        Image.new("RGB", (9, 5), name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(encoded(noise(40, 40))[:500])

    def build(records: list[Any], limit: int = 2048, template: Any = "v1", **changes: Any) -> LazySupervisedDataset:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records))
        return LazySupervisedDataset(str(path), tokenizer(limit), arguments(path, **changes), template)

    return build


def collate(dataset: LazySupervisedDataset, *indices: int) -> dict[str, Any]:
    return DataCollatorForSupervisedDataset(dataset.tokenizer)([dataset[index] for index in indices])


def color(image: torch.Tensor) -> str:
    """The color in the center of a (3, S, S) image; "none" for zeros."""
    middle = image[:, 14, 14]
    return "none" if not image.any() else ("red", "green", "blue")[int(middle.argmax())]


@pytest.mark.golden
def test_golden_batches(golden_dir: Path, vicuna_tokenizer_file: Path) -> None:
    folder = golden_dir / "train"
    for case in json.loads((folder / "dataset.json").read_text())["cases"]:
        conversation.default_conversation = conv_templates[case["version"]]
        made = LlamaTokenizer(
            str(vicuna_tokenizer_file), legacy=case["legacy"], model_max_length=case["model_max_length"]
        )
        made.pad_token = made.unk_token
        args = arguments(
            folder / case["data"],
            image_folder=str(folder / "images"),
            image_aspect_ratio=case["image_aspect_ratio"],
            image_processor=processor(case["size"]),
        )
        dataset = LazySupervisedDataset(args.data_path, made, args)
        assert (len(dataset), dataset.lengths) == (case["len"], case["lengths"])
        assert dataset.modality_lengths == case["modality_lengths"]
        batch = collate(dataset, *case["indices"])
        for key in ("input_ids", "labels"):
            assert batch[key].tolist() == case[key], case["id"]
        assert batch["attention_mask"].long().tolist() == case["attention_mask"]
        assert list(batch["images"].shape) == case["images"]["shape"]
        difference = batch["images"].flatten()[torch.tensor(case["images"]["index"])]
        assert ((difference - torch.tensor(case["images"]["value"])).abs() > 0.02).sum() <= 2


def test_images_follow_the_rows(make: Make) -> None:
    """Each row contributes its images, or one of zeros."""
    dataset = make(
        [
            record("hi"),
            record("<image>\nwhat?", image="red.png"),
            record("<image> or <image>?", image=["green.png", "blue.png"]),
            record("twice <image> the same <image>", image=["red.png"]),
        ]
    )
    batch = collate(dataset, 2, 0, 1, 3)
    assert batch["images"].shape == (5, 3, 28, 28)
    assert [color(image) for image in batch["images"]] == ["green", "blue", "none", "red", "red"]
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [2, 0, 1, 1]
    assert [tuple(dataset[index]["image"].shape[:-2]) for index in range(3)] == [(3,), (3,), (2, 3)]
    assert dataset.lengths == [2, 3 + 128, 4 + 128, 6 + 128]
    assert dataset.modality_lengths == [-2, 3, 4, 6]


def test_text_run_has_no_images(make: Make) -> None:
    batch = collate(make([record("hi"), record("what?")], is_multimodal=False), 0, 1)
    assert "images" not in batch
    with pytest.raises(DataError, match="record 0: the record has an image, but the run has no --vision_tower"):
        make([record("<image>", image="red.png")], is_multimodal=False)


def test_mask_comes_from_lengths(make: Make) -> None:
    """An <unk> in the text has the id of the padding, yet is attended to and supervised."""
    batch = collate(make([record("hi", "is <unk> ok"), record("a longer question than that", "b")]), 0, 1)
    lengths = batch["attention_mask"].sum(1)
    row = batch["input_ids"][0]
    unknown = (row[: lengths[0]] == 0).nonzero().flatten()
    assert len(unknown) == 1
    assert batch["attention_mask"][0, unknown].all()
    assert batch["labels"][0, unknown] == 0
    assert (batch["labels"][~batch["attention_mask"]] == IGNORE_INDEX).all()


def test_collator_requires_images_in_all_rows_or_none() -> None:
    ids = torch.tensor([1, 2])
    rows = [{"input_ids": ids, "labels": ids, "image": torch.zeros(3, 4, 4)}, {"input_ids": ids, "labels": ids}]
    for batch in (rows, rows[::-1]):
        with pytest.raises(DataError, match="1 of 2 rows"):
            DataCollatorForSupervisedDataset(tokenizer())(batch)
    rows[1]["image"] = torch.zeros(3, 5, 5)
    assert isinstance(DataCollatorForSupervisedDataset(tokenizer())(rows)["images"], list)


def test_truncation_keeps_the_image_and_is_counted(make: Make) -> None:
    dataset = make([record("word " * 50 + "<image> <image>", image=["red.png", "blue.png"]), record("a")], limit=60)
    dataset.data_args.mm_use_im_start_end = True
    item = dataset[0]
    assert len(item["input_ids"]) == 60
    assert (item["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 2
    assert item["image"].shape[0] == 2
    assert dataset.report() == {"bad": 0, "truncated": 1, "unsupervised": 1}
    assert torch.equal(collate(dataset, 0)["input_ids"][0], item["input_ids"])


# ------------------------------------------------------------------ bad records


@pytest.mark.parametrize(
    ("bad", "kind", "why"),
    [
        (record("<image>", image="missing.png"), ImageError, "missing.png: no such file"),
        (record("<image>", image="broken.png"), ImageError, "broken.png: the file is damaged"),
        (record("<image>", image=["red.png", "data.json"]), DataError, "has 2 images, but its turns contain 1"),
        (record("no placeholder", image="red.png"), DataError, "has 1 images, but its turns contain 0"),
        (record("<image>"), DataError, "has 0 images"),
        ({"conversations": [{"from": "user", "value": "x"}]}, DataError, "from 'user'"),
        ("text", DataError, "the record is str"),
    ],
)
def test_errors_of_bad_records(make: Make, tmp_path: Path, bad: Any, kind: type, why: str) -> None:
    with pytest.raises(kind, match=why) as error:
        make([record("hi"), bad])[1]
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/data.json, record 1: ")
    assert "--on_bad_sample skip" in text and "\n" not in text


def test_skip_prefers_the_next_record_of_the_same_modality(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        record("<image>", image="missing.png"),
        record("text"),
        record("<image>", image="broken.png"),
        record("<image>", image="blue.png"),
        record("<image> without a file"),
    ]
    with caplog.at_level(logging.WARNING):
        dataset = make(records, on_bad_sample="skip")
        assert dataset.report()["bad"] == 1  # the last one, known before images are opened
        for _ in range(3):
            assert color(dataset[0]["image"]) == color(dataset[2]["image"]) == "blue"
            assert torch.equal(dataset[4]["input_ids"], dataset[1]["input_ids"])
    assert dataset.report()["bad"] == 3
    assert [text.startswith("Skipped: ") for text in caplog.messages] == [True] * 3


def test_skip_falls_back_to_another_modality(make: Make) -> None:
    """A bad record without a known image, in a dataset of images."""
    dataset = make(
        [{**record("<image>"), "picture": "red.png"}, record("<image>", image="blue.png")], on_bad_sample="skip"
    )
    assert color(dataset[0]["image"]) == "blue" and dataset.report()["bad"] == 1


def test_skip_counts_across_workers(make: Make) -> None:
    records = [record("<image>", image="red.png" if index % 4 else "missing.png") for index in range(32)]
    dataset = make(records, on_bad_sample="skip")
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=DataCollatorForSupervisedDataset(tokenizer()))
    assert sum(len(batch["input_ids"]) for batch in loader) == 32
    assert dataset.report()["bad"] == 8


def test_skip_stops_at_too_many_bad_records(make: Make, tmp_path: Path) -> None:
    records = [record("<image>", image="red.png") for _ in range(40)]
    dataset = make(records, on_bad_sample="skip", image_folder=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"11 of 40 records .* more than the 10 that may be skipped"):
        dataset[5]


def test_no_replacement_left(make: Make) -> None:
    dataset = make([record("<image>", image=f"missing{index}.png") for index in range(2)], on_bad_sample="skip")
    with pytest.raises(DataError, match="no replacement for record 0"):
        dataset[0]
    with pytest.raises(DataError, match="no usable record"):
        make([record("<image>")], on_bad_sample="skip")


def test_unknown_keys_are_logged_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    turn = {"from": "gpt", "value": "a", "note": 1, "model": "m"}
    records = [record("a") | {"id": 3, "model": ""}, record("b") | {"picture": 1}, record("c") | {"picture": "x"}]
    records[2]["conversations"][1] = turn
    make(records)
    assert [message.split(": ")[1] for message in caplog.messages] == [
        "key 'picture' is not used (2 x, first in record 1).",
        "key 'turn.note' is not used (1 x, first in record 2).",
    ]


def test_the_layout_of_hugging_face_datasets(make: Make, tmp_path: Path) -> None:
    """Messages with parts, and images inside a Parquet file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    made = make(
        [record("<image>\nwhat?\nnow", image="red.png"), record("a <image> b <image>", image=["red.png", "blue.png"])]
    )
    stored = [{"bytes": (tmp_path / f"{name}.png").read_bytes(), "path": None} for name in ("red", "blue")]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}, {"type": "text", "text": "now"}]
    rows = [
        {
            "images": stored[:1],
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "A.PARQUET")
    dataset = LazySupervisedDataset(str(tmp_path / "A.PARQUET"), tokenizer(), arguments(tmp_path / "x"), "v1")
    for key in ("input_ids", "labels", "image"):
        assert torch.equal(dataset[0][key], made[0][key])
    assert dataset.modality_lengths == [4]
    text = [{"role": "user", "content": "a <image> b <image>"}, {"role": "assistant", "content": "yes"}]
    pq.write_table(pa.Table.from_pylist([{"image": stored, "messages": json.dumps(text)}]), tmp_path / "b.parquet")
    dataset = LazySupervisedDataset(str(tmp_path / "b.parquet"), tokenizer(), arguments(tmp_path / "x"), "v1")
    for key in ("input_ids", "labels", "image"):
        assert torch.equal(dataset[0][key], made[1][key])


def test_an_answer_of_weight_0_is_not_learned(make: Make) -> None:
    turns = [("human", "q", None), ("gpt", "bad", 0), ("human", "r", None), ("gpt", "good", 1)]
    weighed = {"conversations": [{"from": a, "value": b, "weight": c} for a, b, c in turns]}
    dataset = make([weighed, {"conversations": [{"from": a, "value": b} for a, b, _ in turns]}])
    labels, full = dataset[0]["labels"], dataset[1]["labels"]
    assert torch.equal(dataset[0]["input_ids"], dataset[1]["input_ids"])
    decoded = dataset.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert "good" in decoded and "bad" not in decoded
    assert "bad" in dataset.tokenizer.decode(full[full != IGNORE_INDEX])


def test_transparent_images_are_trained_on_white(make: Make, tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9)).save(tmp_path / "clear.png")
    Image.new("RGB", (9, 9), "white").save(tmp_path / "white.png")
    dataset = make([record("<image>", image=f"{name}.png") for name in ("clear", "white")])
    assert torch.equal(dataset[0]["image"], dataset[1]["image"])


# ------------------------------------------------------------------ the module for the trainer


def test_data_module(make: Make, tmp_path: Path) -> None:
    make([record("hi"), record("<image>", image="red.png")])
    args = arguments(tmp_path / "data.json")
    module = make_supervised_data_module(tokenizer(), args, "vicuna_v1")
    assert len(module["train_dataset"]) == 2
    assert module["eval_dataset"] is None
    assert isinstance(module["data_collator"], DataCollatorForSupervisedDataset)
    with pytest.raises(TemplateError, match=r"'mpt' does not fit .* templates that fit: default"):
        make_supervised_data_module(tokenizer(), args, "mpt")
    with pytest.raises(TemplateError, match="the nearest is 'v1'"):
        make_supervised_data_module(tokenizer(), args, "v1x")
    with pytest.raises(DataError, match="no supervised token, the first is 0"):
        make_supervised_data_module(tokenizer(10), args, "v1")


def test_the_default_template_is_read_by_the_constructor(make: Make) -> None:
    conversation.default_conversation = conv_templates["llava_v0"]
    dataset = make([record("hi")], template=None)
    conversation.default_conversation = conv_templates["v1"]
    assert "###Human: hi" in dataset.tokenizer.decode(dataset[0]["input_ids"])


def test_plain_runs_accept_captions_only(make: Make) -> None:
    dataset = make([record("Describe <image> please", "a cat", "red.png"), record("text only")], template="plain")
    assert dataset[0]["input_ids"][:2].tolist() == [1, IMAGE_TOKEN_INDEX]
    with pytest.raises(DataError, match="record 1: .* use it for captions only"):
        dataset[1]
