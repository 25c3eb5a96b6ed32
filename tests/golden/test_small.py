"""A small subset of the golden values of the reference: prompts, model names, sample orders.

Cases marked as defects of the reference are excluded. `tests/test_golden.py` runs the full set where it is available.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path
from llava.train.llava_trainer import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
)


def read(name: str) -> Any:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


PROMPTS = read("prompts.json")


@pytest.mark.parametrize("case", PROMPTS["cases"], ids=lambda case: case["id"])
def test_prompt(case: dict[str, Any]) -> None:
    chat = conv_templates[case["template"]].copy()
    if case.get("keep_few_shot") is False:
        chat.messages = []
    for index, turn in enumerate(PROMPTS["dialogues"][case["dialogue"]]):
        message = (turn[0], Image.new("RGB", (4, 4)), turn[1]) if isinstance(turn, list) else turn
        chat.append_message(chat.roles[index % 2], message)
    assert chat.get_prompt() == case["prompt"]


@pytest.mark.parametrize("case", read("names.json"), ids=lambda case: case["id"])
def test_name(case: dict[str, Any]) -> None:
    assert get_model_name_from_path(case["path"]) == case["name"]


@pytest.mark.parametrize("case", read("samplers.json"), ids=lambda case: case["id"])
def test_order_of_samples(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"]) if case["generator"] else None
    torch.manual_seed(case["seed"])
    lengths, batch_size, world_size = case["lengths"], case["batch_size"], case["world_size"]
    if case["kind"] == "length":
        order = get_length_grouped_indices(lengths, batch_size, world_size, generator=generator)
    elif case["kind"] == "modality":
        order = get_modality_length_grouped_indices(lengths, batch_size, world_size)
    else:
        order = list(LengthGroupedSampler(batch_size, world_size=world_size, lengths=lengths, group_by_modality=True))
    assert [int(index) for index in order] == case["order"]
