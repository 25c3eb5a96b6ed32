"""The training loss of a model: weights of rows, and the same loss in chunks for every kind of head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from llava.model.builder import load_pretrained_model
from llava.model.language_model import lm_head
from tests import devices, tiny
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


class Table(torch.nn.Module):
    """A head that is no `LMHead`, so that the loss uses the table of all logits."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits


def compare_with_table(model: Any, monkeypatch: pytest.MonkeyPatch, **tolerance: float) -> None:
    """Loss and gradients of a `LlavaForCausalLMMixin` in chunks of a few tokens equal those by the table."""
    assert type(model.lm_head) is lm_head.LMHead
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 5 * model.lm_head.weight[:, 0].numel() * 4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch, weights, found = batch_of(ROWS, 8), torch.tensor([0.1, 0.0, 0.3]), []
    for head in (model.lm_head, Table(model.lm_head)):
        model.lm_head = head
        torch.manual_seed(0)  # of dropout
        loss = model.train()(**batch, row_weights=weights).loss
        found.append([loss, *torch.autograd.grad(loss, trained, allow_unused=True)])
    assert len(found[0]) > 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def prepared_chat(kind: str, directory: Path, tower: Path) -> Any:
    if kind == "mpt":
        return load_pretrained_model(tiny.make_mpt_chat(directory, tower), device="cpu")[1]
    chat = tiny.make_chat(directory, tower, tie_word_embeddings=kind == "tied")
    model = load_pretrained_model(chat, device="cpu")[1].requires_grad_(True)
    if kind == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    elif kind == "resized":
        model.resize_token_embeddings(390)
        assert model.lm_head.weight.shape[0] == 390 and "lm_head.weight" in dict(model.named_parameters())
    elif kind == "head with a bias":
        model.set_output_embeddings(torch.nn.Linear(*reversed(model.lm_head.weight.shape)))
    elif kind == "lora":
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        assert not model.lm_head.weight.requires_grad
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    return model


@pytest.mark.parametrize("kind", ["plain", "tied", "resized", "head with a bias", "lora", "mpt"])
def test_every_head_computes_the_loss_in_chunks(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    compare_with_table(prepared_chat(kind, tmp_path, tiny_dirs["tower"]), monkeypatch)


def test_no_synchronization_in_the_loss(tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed step of several chunks waits for the GPU as often as one of a single chunk without row weights."""
    monkeypatch.setattr(lm_head, "CHUNK_BYTES_CUDA", 5 * 384 * 4)
    with devices.simulated_cuda() as card:
        model = load_pretrained_model(tiny_dirs["chat"], device="cuda")[1].train().requires_grad_(True)
        batch = {name: value.to("cuda") for name, value in batch_of(ROWS, 8).items()}
        weights = torch.tensor([0.1, 0.0, 0.3]).to("cuda")
        embeds, lengths, labels = model.pack_inputs_and_labels(**batch)
        with card.record() as events:
            hidden = torch.randn(sum(lengths), embeds.shape[1], device="cuda", requires_grad=True)
            monkeypatch.setattr(model, "pack_inputs_and_labels", lambda **given: (embeds, lengths, labels))
            monkeypatch.setattr(type(model.model), "forward", lambda self, keep, **given: hidden.index_select(0, keep))
            model(**batch, row_weights=weights).loss.backward()
        assert hidden.grad is not None and hidden.grad.cpu().any()
    assert not events.syncs and not events.downloads, f"\n{events.table()}"
