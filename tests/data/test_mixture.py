"""Mixtures: validation, sampling over repeats, and training with the requested template."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llava.data.mixture import read_mixture
from llava.errors import DataError
from llava.train.train import run
from llava.train.train_custom import main
from llava.train.validation import split
from tests.train import runs


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("sets") / "mix", samples=8, text_rows=range(8))


def write(path: Path, meta: Any) -> Path:
    path.write_text(json.dumps(meta))
    return path


def mixture(sets: Path, root: Path) -> Path:
    """Images twice, text once."""
    entries = {
        "images": {"annotation": str(sets / "pretrain.json"), "root": str(sets / "images"), "repeat_time": 2},
        "words": {"annotation": str(sets / "finetune.json"), "root": "", "data_augment": False},
    }
    return write(root / "meta.json", entries)


def test_every_sample_of_every_repeat_is_drawn_once_an_epoch(
    sets: Path, tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.arguments import parse_arguments
    from llava.data.dataset import LazySupervisedDataset

    drawn: Counter[tuple[str, int]] = Counter()
    load = LazySupervisedDataset.__getitem__

    def counted(self: LazySupervisedDataset, index: int) -> Any:
        drawn[Path(self.data_path).stem, index] += 1
        return load(self, index)

    monkeypatch.setattr(LazySupervisedDataset, "__getitem__", counted)
    meta = mixture(sets, tmp_path)
    argv = runs.flags(tiny_dirs, sets, tmp_path / "out", 2, data_path=None, image_folder=None, meta_path=meta)
    trainer = run(*parse_arguments([*argv, "--group_by_modality_length", "True"]))
    assert drawn == {**{("pretrain", i): 2 for i in range(8)}, **{("finetune", i): 1 for i in range(8)}}
    data = trainer.train_dataset
    assert len(data) == len(data.lengths) == 24
    assert [length > 0 for length in data.modality_lengths] == [True] * 16 + [False] * 8
    assert data.report() == {"bad": 0, "truncated": 0, "unsupervised": 0}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["conv_template"] == "v1"
    part, held_out = split(data, 0.25, seed=3)
    kept, held = ([data.record_of(index) for index in subset.indices] for subset in (part, held_out))
    assert len(held) == len(set(held)) and not set(held) & set(kept) and len({*held, *kept}) == 16
    assert len(kept) < 24 - len(held)  # a repeat of what is held out is left out


def test_the_entry_point_reports_a_missing_mixture(
    tiny_dirs: dict[str, Path], sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = runs.flags(tiny_dirs, sets, tmp_path / "out", 2, data_path=None, meta_path=tmp_path / "absent.json")
    assert main(argv) == 2
    assert "absent.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([], "expected an object"),
        ({"a": 1}, "a: the entry is int"),
        ({"a": {"annotation": "x.csv"}}, "annotation is 'x.csv'"),
        ({"a": {}}, "annotation is None"),
        ({"a": {"annotation": "x.json", "root": "s3://bucket"}}, "root is 's3://bucket'"),
        ({"a": {"annotation": "x.json", "repeat_time": 0}}, "repeat_time is 0"),
        ({"a": {"annotation": "x.json", "repeat_time": True}}, "repeat_time is True"),
        ({"a": {"annotation": "x.json", "weight": 2}}, "unknown key 'weight'"),
    ],
)
def test_invalid_mixtures(tmp_path: Path, meta: Any, message: str) -> None:
    with pytest.raises(DataError, match="mixture") as caught:
        read_mixture(write(tmp_path / "meta.json", meta))
    assert message in str(caught.value)


def test_data_augment_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"annotation": "x.jsonl", "data_augment": True}
    (read,) = read_mixture(write(tmp_path / "meta.json", {"a": entry}))
    assert (read.repeat_time, read.root) == (1, "")
    assert "data_augment is ignored" in caplog.text
