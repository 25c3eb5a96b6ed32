"""The training loss: weights of rows, and the mean without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.model.builder import load_pretrained_model
from tests import tiny
from tests.model.test_packed import batch_of, gradients

ROWS = [(12, 1), (5, 0), (30, 2)]


@pytest.fixture(scope="module")
def chats(tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    mpt = tiny.make_mpt_chat(tmp_path_factory.mktemp("mpt"), tiny_dirs["tower"])
    return {"llama": load_pretrained_model(tiny_dirs["chat"], device="cpu")[1],
            "mpt": load_pretrained_model(mpt, device="cpu")[1]}  # fmt: skip


def expected_loss(model: Any, batch: dict[str, Tensor], weights: Tensor | None) -> Tensor:
    """The loss by its definition, from the logits of every position."""
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    rows = [
        torch.nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="sum")
        for row, targets in zip(logits, labels, strict=True)
    ]
    if weights is None:
        return torch.stack(rows).sum() / (labels[:, 1:] != -100).sum()
    return (torch.stack(rows) * weights).sum()


@pytest.mark.parametrize("weights", [None, [0.25, 0.0, 2.0]])
@pytest.mark.parametrize("way", ["training", "evaluation", "extra outputs"])
@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_row_weights(chats: dict[str, Any], kind: str, way: str, weights: list[float] | None) -> None:
    model, batch = chats[kind].train(way != "evaluation"), batch_of(ROWS, 7)
    row_weights = None if weights is None else torch.tensor(weights)
    extra = {"output_hidden_states": True} if way == "extra outputs" else {}
    loss = model(**batch, row_weights=row_weights, **extra).loss
    expected = expected_loss(model, batch, row_weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
