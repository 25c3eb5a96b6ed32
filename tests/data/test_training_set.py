"""Distinct images of annotation files: each record has its images, each image its records, found without copies."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

from llava.data.training_set import TrainingSet
from tests.data.test_dataset import record

RECORDS = 10_000


def test_records_and_images_are_looked_up_without_copies_of_their_tables(tmp_path: Path) -> None:
    """A copy for each of 665,000 records would be quadratic."""
    draw = random.Random(0)
    names = [f"{draw.randrange(RECORDS // 4)}.jpg" if draw.random() < 0.9 else None for _ in range(RECORDS)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record("<image>\nQ?" if name else "Q?", image=name) for name in names]))
    training = TrainingSet([(path, None)])
    order = list(dict.fromkeys(filter(None, names)))
    assert len(training) == len(order) and training.name(7) == str(tmp_path / order[7])
    numbers = {name: index for index, name in enumerate(order)}
    owners: dict[int, list[int]] = {index: [] for index in range(len(order))}
    for number, name in enumerate(names):
        assert training.images_of(number) == ([numbers[name]] if name else [])
        if name:
            owners[numbers[name]].append(number)
    assert [training.records_of(index) for index in range(len(order))] == list(owners.values())

    tracemalloc.start()
    training.images_of(RECORDS // 2)
    training.records_of(len(order) // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < RECORDS  # bytes
