"""The table of directories: each kind loads as one class with the same logits under five names, or is refused at once.

Users.md LOAD-1 to LOAD-4; the kinds are in `tests/model/zoo.py`.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import LlavaError
from llava.model import builder
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.multimodal_encoder import tower
from tests.model import zoo

NAMES = ("a", "checkpoint-500", "my-lora", "mpt-x", "llava-v1.5")
IDS = torch.tensor([[1, 5, -200, 9, 11]])
PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
SECONDS = 5.0


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> zoo.Shelf:
    return zoo.shelf(tmp_path_factory.mktemp("shelf"))


@torch.no_grad()
def found(directory: Path, base: Path | None, options: dict[str, Any]) -> tuple[str, torch.Tensor]:
    told: list[float] = []
    options = {"dtype": "float32", "progress": told.append, **options}
    model = load_pretrained_model(directory, base, directory.name, device="cpu", **options)[1]
    assert told == sorted(told) and told[-1] == 1.0
    assert told[-2] > 0.5 and told[0] < 0.5
    if model.get_vision_tower() is None:
        return type(model).__name__, model(IDS.clamp(min=0)).logits
    return type(model).__name__, model(IDS, images=PIXELS).logits


def test_there_are_many() -> None:
    assert len(zoo.LOADS) + len(zoo.REFUSED) >= 50


@pytest.mark.parametrize("kind", zoo.LOADS)
def test_it_loads_whatever_it_is_called(shelf: zoo.Shelf, tmp_path: Path, kind: str) -> None:
    row = zoo.LOADS[kind]
    base = getattr(shelf, row.base) if row.base else None
    directory = tmp_path / "first"
    row.make(shelf, directory)
    expected: torch.Tensor | None = None
    for name in NAMES:
        directory = directory.rename(tmp_path / name)
        model, logits = found(directory, base, row.options)
        assert model == row.model
        assert logits.isfinite().all()
        assert expected is None or torch.equal(logits, expected)
        expected = logits
    if not row.options:
        examine(directory, base)


def test_layouts_of_one_model_are_one_function(shelf: zoo.Shelf, tmp_path: Path) -> None:
    same = [
        *("full, one safetensors", "full, sharded safetensors", "full, one .bin", "full, sharded .bin"),
        *(
            "full, .bin of an old PyTorch",
            "full, model_type llava",
            "full, model_type llama",
            "full, of an old library",
        ),
        *("full, rotary tables stored", "full, tower inside", "full, tower beside"),
    ]
    _, expected = found(shelf.chat, None, {})
    for number, kind in enumerate(same):
        zoo.LOADS[kind].make(shelf, tmp_path / str(number))
        assert torch.equal(found(tmp_path / str(number), None, {})[1], expected), kind


@pytest.mark.parametrize("kind", zoo.REFUSED)
def test_it_is_refused_before_weights_are_read(
    shelf: zoo.Shelf, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = zoo.REFUSED[kind]
    row.make(shelf, tmp_path / "it")
    for module in (builder, tower):
        monkeypatch.setattr(module, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    if kind == "cut short":
        monkeypatch.undo()  # the index is looked at first, by the reader itself
    start = time.monotonic()
    with pytest.raises(LlavaError) as error:
        found(tmp_path / "it", getattr(shelf, row.base) if row.base else None, {})
    assert time.monotonic() - start < SECONDS
    assert re.search(row.words, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
