"""Fixtures of evaluations: a tiny engine, images, a judge, and question files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.engine import Engine, load_engine
from tests.eval.fake_server import FakeServer
from tests.threads import one_thread

__all__ = ["one_thread"]  # an autouse fixture

COLORS = ("red", "green", "blue", "gray")


@pytest.fixture(scope="package")
def engine(tiny_dirs: dict[str, Path]) -> Engine:
    return load_engine(tiny_dirs["chat"], device="cpu", max_batch_size=4)


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for color in COLORS:
        Image.new("RGB", (30, 20), color).save(folder / f"{color}.png")
    return folder


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A loopback judge, configured in the environment."""
    fake = FakeServer()
    monkeypatch.setenv("OPENAI_BASE_URL", fake.url + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield fake
    fake.close()


def question_rows(count: int) -> list[dict[str, Any]]:
    """Questions about the four images in turn, every fifth without one; two share each id, as in MME."""
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
