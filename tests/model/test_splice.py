"""The splice against a literal implementation of the contract's rule (spec/model.md §8.3), over random batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import RequestError
from llava.model.splice import check_slots, encode_slots, splice_batch

WIDTH, FEATURES = 3, 4


@dataclass
class Batch:
    rows: list[list[int]]
    slots: list[Tensor]
    side: str

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels `(B, T)`; labels equal ids at odd positions."""
        longest = max(map(len, self.rows))
        ids, mask, labels = [], [], []
        for row in self.rows:
            pad = [0] * (longest - len(row))
            label = [token if i % 2 and token >= 0 else IGNORE_INDEX for i, token in enumerate(row)]
            parts = ([row, pad], [[1] * len(row), pad], [label, [IGNORE_INDEX] * len(pad)])
            for target, (real, blank) in zip((ids, mask, labels), parts):
                target.append(real + blank if self.side == "right" else blank + real)
        return torch.tensor(ids), torch.tensor(mask).bool(), torch.tensor(labels)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    token = st.one_of(st.integers(1, 9), st.just(IMAGE_TOKEN_INDEX))
    rows = draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=4))
    count = sum(max(1, row.count(IMAGE_TOKEN_INDEX)) for row in rows)
    slots = [torch.randn(draw(st.integers(1, FEATURES)), WIDTH) for _ in range(count)]
    return Batch(rows, slots, draw(st.sampled_from(["right", "left"])))


def literal(batch: Batch) -> tuple[list[Tensor], list[list[int]]]:
    """Embeddings and labels of each row without padding, token by token."""
    embedding = table()
    rows, labels, slot = [], [], 0
    for row in batch.rows:
        pieces, label = [], []
        for i, token in enumerate(row):
            if token == IMAGE_TOKEN_INDEX:
                pieces.append(batch.slots[slot])
                label += [IGNORE_INDEX] * len(batch.slots[slot])
                slot += 1
            else:
                pieces.append(embedding[token][None])
                label.append(token if i % 2 else IGNORE_INDEX)
        if IMAGE_TOKEN_INDEX not in row:
            slot += 1
        rows.append(torch.cat(pieces))
        labels.append(label)
    return rows, labels


def table() -> Tensor:
    return torch.arange(10.0)[:, None].expand(10, WIDTH) + 100


@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_every_mix(batch: Batch) -> None:
    ids, mask, labels = batch.padded()
    embeds = table()[ids.clamp(min=0)]
    out = splice_batch(ids, embeds, batch.slots, attention_mask=mask, labels=labels)
    rows, row_labels = literal(batch)
    assert out.labels is not None
    assert out.inputs_embeds.shape[1] == max(map(len, rows))
    for b, (want, want_labels) in enumerate(zip(rows, row_labels)):
        real = out.attention_mask[b]
        assert int(real.sum()) == len(want)
        assert torch.equal(out.inputs_embeds[b, real], want)
        assert out.labels[b, real].tolist() == want_labels
        assert out.position_ids[b, real].tolist() == list(range(len(want)))
        assert not out.inputs_embeds[b, ~real].any()
        assert (out.labels[b, ~real] == IGNORE_INDEX).all()
        if batch.side == "right" or len(set(map(len, batch.rows))) == 1:
            assert real[: len(want)].all()
        else:
            assert real[-len(want) :].all()


@settings(max_examples=50, deadline=None)
@given(batch=batches(), past=st.integers(1, 5))
def test_a_past_is_continued(batch: Batch, past: int) -> None:
    ids, mask, _ = batch.padded()
    before = torch.ones(len(ids), past, dtype=torch.bool)
    before[0, 0] = False
    out = splice_batch(
        ids, table()[ids.clamp(min=0)], batch.slots, attention_mask=torch.cat([before, mask], 1), past_length=past
    )
    assert torch.equal(out.attention_mask[:, :past], before)
    for b, want in enumerate(literal(batch)[0]):
        real = out.attention_mask[b, past:]
        start = int(before[b].sum())
        assert out.position_ids[b, real].tolist() == list(range(start, start + len(want)))


def test_without_mask_and_labels() -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 2], [3, 4, 5]])
    out = splice_batch(ids, table()[ids.clamp(min=0)], [torch.ones(4, WIDTH), torch.ones(4, WIDTH)])
    assert out.labels is None
    assert out.attention_mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


@pytest.mark.parametrize("slots", [1, 3])
def test_the_number_of_images_is_checked(slots: int) -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX], [1, 2]])
    with pytest.raises(RequestError, match=rf"2 image slots .*\[1, 0\].* but {slots} images"):
        check_slots(ids, slots)


def test_every_image_layout() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)

    def encode(batch: Tensor) -> Tensor:
        return batch[:, :1, 0, :1].expand(-1, 2, WIDTH)  # two tokens an image, holding its number

    flat = [0.0, 1.0, 2.0, 3.0]
    assert [slot[0, 0].item() for slot in encode_slots(images, encode)] == flat
    assert [slot[0, 0].item() for slot in encode_slots(list(images), encode)] == flat
    pairs = encode_slots(images.reshape(2, 2, 3, 2, 2), encode)
    assert [slot[:, 0].tolist() for slot in pairs] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    ragged = encode_slots([images[:1], images[1:]], encode)
    assert [len(slot) for slot in ragged] == [2, 6]
    mixed = encode_slots([images[0], torch.full((3, 5, 5), 9.0)], encode)
    assert [slot[0, 0].item() for slot in mixed] == [0.0, 9.0]
    with pytest.raises(RequestError, match="4-D, 5-D"):
        encode_slots([torch.zeros(2, 2)], encode)


def test_gradients_reach_text_and_features_but_not_an_unused_slot() -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX], [1, 2]])
    embeds = torch.randn(2, 2, WIDTH, requires_grad=True)
    used, unused = (torch.randn(2, WIDTH, requires_grad=True) for _ in range(2))
    splice_batch(ids, embeds, [used, unused]).inputs_embeds.sum().backward()
    assert used.grad is not None
    assert used.grad.abs().sum() > 0
    assert unused.grad is not None  # it stays in the graph, so that all ranks run the same collectives
    assert unused.grad.abs().sum() == 0
    assert embeds.grad is not None
    assert embeds.grad[0, 1].abs().sum() == 0
