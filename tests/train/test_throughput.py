"""Throughput metrics: tokens and samples per second, and MFU on known devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.train import throughput
from llava.train.flops import Shape, Trainable, step_flops
from llava.train.steps import FILLER, MicroBatch, count_step

SHAPE = Shape(64, 128, 2, 4, 4, 1000)


def test_throughput_metrics() -> None:
    counted = {"tokens": 3000.0, "samples": 6.0, "supervised": 600.0, "images": 0.0}
    line = throughput.ThroughputMeter(SHAPE, Trainable(), None).metrics(seconds=2.0, **counted)
    assert line == {"tokens_per_second": 1500.0, "samples_per_second": 3.0}
    work = step_flops(SHAPE, Trainable(), tokens=3000, length=500, images=0, supervised=600)
    assert throughput.ThroughputMeter(SHAPE, Trainable(), work).metrics(seconds=2.0, **counted)["mfu"] == 0.5
    assert "mfu" not in throughput.ThroughputMeter(None, Trainable(), 1e12).metrics(seconds=2.0, **counted)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (36_610, "10:10:10")])
def test_time_left(seconds: float, text: str) -> None:
    assert throughput.format_duration(seconds) == text


def test_meter_reads_shape_and_trainable_parts_from_the_model(tiny_dirs: dict[str, Path]) -> None:
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1].requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    args: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    found = throughput.ThroughputMeter.of(model, args)
    assert found.peak is None and found.trainable == Trainable(language=False, projector=True)
    assert found.shape == Shape(48, 96, 2, 4, 2, 384, 32, 64, 3, 17, 16)
    weights = sum(p.numel() for name, p in model.named_parameters() if "vision" not in name and "projector" not in name)
    assert found.shape.language_weights == weights
    assert found.shape.projector_weights == sum(p.numel() for p in model.get_model().mm_projector.parameters())


def test_counts_of_a_step_expand_images_and_leave_fillers_out() -> None:
    ids = torch.tensor([[1, -200, 5], [1, 6, 0]])
    labels = torch.tensor([[-100, -100, 5], [-100, 6, -100]])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": ids != 0, "images": torch.zeros(2, 3, 2, 2)}
    text = {"input_ids": ids[1:], "labels": torch.full((1, 3), -100)}
    step = [(MicroBatch((4, 5), (0, 1)), inputs), (MicroBatch((6,), (1,)), text), (FILLER, inputs)]
    assert count_step(step, 2**24) == {"tokens": 5 + 2**24 - 1 + 3, "supervised": 2, "samples": 3, "images": 2}
    assert count_step(step, 0)["tokens"] == 5 + 3
