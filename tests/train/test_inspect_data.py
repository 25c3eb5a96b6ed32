"""`llava inspect-data`: the ids and labels of training, in colors; records cannot control the terminal."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from llava.constants import IGNORE_INDEX
from llava.data.dataset import LazySupervisedDataset
from llava.model.tokenizer import load_tokenizer
from llava.train.inspect_data import main
from tests.data.test_dataset import arguments, record

RECORDS = [
    record("<image>\nWhat color is the shape?", "The shape is red.", image="a.png"),
    record("Why? \x1b[2J<script>alert(1)</script>", "So."),
    {"conversations": []},
    record("a " * 300 + "<image> <image>", "red", image=["a.png", "b.png"]),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return tmp_path / "data.json"


def test_in_the_terminal(file: Path, tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(file), "--model", str(tiny_dirs["base"]), "--samples", "9", "--model_max_length", "120"]
    assert main([*argv, "--color", "always"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"\x1b\[33m<image 1>\x1b\[0m", output)
    assert re.search(r"\x1b\[32m *The shape is red\.</s>\x1b\[0m", output)
    assert "\x1b[2J" not in output and "record 2 is bad: conversations is missing" in output
    assert "record 0, a.png" in output and "with 1 images of 576 each" in output
    assert re.search(
        r"120 ids, 0 supervised; 1270 positions with 2 images of 576 each; \d+ ids truncated at --model_max_length 120",
        output,
    )
    assert main([*argv, "--records", "0"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and "‹<image 1>›" in plain and "The shape is red.</s>⟧" in plain
    assert main([*argv, "--records", "7"]) == 1
    assert "index 7 is out of range: " in capsys.readouterr().out


def test_the_page_has_the_tokens_of_training(file: Path, tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    assert main([str(file), "--model", str(tiny_dirs["base"]), "--html", str(file / "page.html")]) == 2  # below a file
    page = tmp_path / "views" / "page.html"
    assert main([str(file), "--model", str(tiny_dirs["base"]), "--records", "0", "1", "--html", str(page)]) == 0
    text = page.read_text()
    assert "<script>" not in text and html.escape("<script>")[:4] in text
    tokenizer = load_tokenizer(tiny_dirs["base"], model_max_length=2048, padding_side="right")
    (file.parent / "two.json").write_text(json.dumps(RECORDS[:2]))
    dataset = LazySupervisedDataset(str(file.parent / "two.json"), tokenizer, arguments(file), "v1")
    for index, block in enumerate(re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)):
        shown = re.findall(r'<i class="(\w+)" title="(-?\d+)">', block)
        example = dataset.example(dataset._record(index))
        assert [int(token) for _, token in shown] == example.input_ids.tolist()
        assert [kind == "supervised" for kind, _ in shown] == (example.labels != IGNORE_INDEX).tolist()
        assert [kind == "image" for kind, _ in shown] == (example.input_ids == -200).tolist()
