"""A tiny engine, pictures and a question file to run evaluations on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.engine import Engine, load_engine

COLORS = ("red", "green", "blue", "gray")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run many times faster on one thread when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def engine(tiny_dirs: dict[str, Path]) -> Engine:
    return load_engine(tiny_dirs["chat"], device="cpu", max_batch_size=4)


@pytest.fixture(scope="package")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for color in COLORS:
        Image.new("RGB", (30, 20), color).save(folder / f"{color}.png")
    return folder


def question_rows(count: int) -> list[dict[str, Any]]:
    """Questions about the pictures in turn, every fifth about none; two share each id, as in MME."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row = {"question_id": number // 2, "image": f"{COLORS[number % 4]}.png", "text": f"What is number {number}?"}
        if number % 5 == 4:
            del row["image"]
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
