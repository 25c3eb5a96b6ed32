"""The splice against a token-by-token implementation, over random batches, and how often it waits for a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import RequestError
from llava.model.builder import load_pretrained_model
from llava.model.splice import check_slots, encode_slots, splice_batch, splice_prompt
from llava.model.transfer import to_host, upload
from tests import devices

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


def test_a_masked_placeholder_is_refused() -> None:
    ids, mask = torch.tensor([[1, IMAGE_TOKEN_INDEX]]), torch.tensor([[1, 0]])
    with pytest.raises(RequestError, match="attention_mask is 0 at an <image> placeholder"):
        splice_batch(ids, torch.zeros(1, 2, WIDTH), [torch.ones(2, WIDTH)], attention_mask=mask)


@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_a_prompt_is_a_row_of_a_batch(batch: Batch) -> None:
    slots = iter(batch.slots)
    for row, want in zip(batch.rows, literal(batch)[0]):
        taken = [next(slots) for _ in range(max(1, row.count(IMAGE_TOKEN_INDEX)))]
        used = taken[: row.count(IMAGE_TOKEN_INDEX)]
        assert torch.equal(splice_prompt(row, used, lambda ids: table()[torch.tensor(ids, dtype=torch.long)]), want)


class Waits(TorchDispatchMode):
    """Records operations whose result the host needs, which wait for the device when their tensors are on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        chosen = name == "index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if chosen or name in ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "equal"):
            self.found.append(name)
        return func(*args, **kwargs or {})


def waits_of(monkeypatch: pytest.MonkeyPatch, model: Any, rows: int, *, ragged: bool, training: bool) -> list[str]:
    ids = torch.randint(3, 300, (rows, 9))
    ids[::2, 1] = IMAGE_TOKEN_INDEX
    mask = torch.ones_like(ids)
    if ragged:
        mask[1::2, 6:] = 0
    images = torch.randn(rows, 3, 56, 56)
    labels = ids.masked_fill((ids < 0) | (mask == 0), IGNORE_INDEX)
    with monkeypatch.context() as patch, Waits() as waits:
        tolist = Tensor.tolist
        patch.setattr(Tensor, "tolist", lambda tensor: (waits.found.append("tolist"), tolist(tensor))[1])
        loss = model.train(training)(ids, attention_mask=mask, labels=labels, images=images).loss
        loss.backward()
    return waits.found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_more_rows_do_not_wait_more_often(
    tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, ragged: bool, training: bool
) -> None:
    """Checked on CPU tensors, where the same operations run on what was copied to the host."""
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]
    model.config.use_cache = False
    few, many = (waits_of(monkeypatch, model, rows, ragged=ragged, training=training) for rows in (2, 8))
    assert many == few
    # The layout of the batch, the supervised positions, and outside packed training the library's attention mask.
    assert few.count("nonzero") == (2 if training else 3)
    assert "index.Tensor" not in few


@pytest.fixture
def card() -> Iterator[devices.Card]:
    with devices.simulated_cuda() as made:
        yield made


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_on_a_device_is_fetched_once(card: devices.Card, side: str) -> None:
    rows = [[1, IMAGE_TOKEN_INDEX, 2], [3], [4, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 5], [6, 7]]
    batch = Batch(rows, [torch.randn(n, WIDTH) for n in (2, 3, 1, 4, 2)], side)
    ids, mask, labels = batch.padded()
    embeds = table()[ids.clamp(min=0)]
    want = splice_batch(ids, embeds, batch.slots, attention_mask=mask, labels=labels)
    ids, mask, labels, embeds, *slots = (part.to("cuda") for part in (ids, mask, labels, embeds, *batch.slots))
    with card.record() as events:
        out = splice_batch(ids, embeds, slots, attention_mask=mask, labels=labels)
    assert (len(events.downloads), len(events.uploads), len(events.syncs)) == (1, 1, 0), events.table()
    for name in ("inputs_embeds", "attention_mask", "position_ids", "labels"):
        found = getattr(out, name)
        assert found.device == embeds.device
        assert torch.equal(found.cpu(), getattr(want, name))
        assert found.dtype == getattr(want, name).dtype


def test_a_prompt_known_on_the_host_is_only_sent(card: devices.Card, tiny_dirs: dict[str, Path]) -> None:
    ids, features = [1, IMAGE_TOKEN_INDEX, 5, 6], torch.randn(2, 48)
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]
    want = model.embed_prompt(ids, [features])
    assert torch.equal(model.embed_prompt(torch.tensor(ids), [features]), want)
    remote = load_pretrained_model(tiny_dirs["chat"], device="cuda", dtype="float32")[1]
    features = features.to("cuda")
    with card.record() as events:
        sent = remote.embed_prompt(ids, [features])
    assert not events.waits and len(events.uploads) == 1, events.table()
    assert torch.equal(sent.detach().cpu(), want)


def test_transfers_keep_order_shape_and_dtype(card: devices.Card) -> None:
    device = torch.device("cuda", 0)
    given = [torch.arange(6).view(2, 3), torch.tensor([[True], [False]]), torch.arange(2, dtype=torch.int32)]
    given += [torch.tensor(0.5), torch.rand(3, 5, dtype=torch.bfloat16).t(), torch.empty(0, 4)]
    assert all(a is b for a, b in zip(to_host(given[0], None), (given[0], None)))
    assert all(a is b for a, b in zip(upload(given, torch.device("cpu")), given))
    with card.record() as events:
        sent = upload(given, device)
        assert len(events.uploads) == 1 and not events.waits, events.table()
        ids, nothing, local, mask = to_host(sent[0], None, given[1], sent[1])
    assert [(t.dtype, t.shape, t.device) for t in sent] == [(t.dtype, t.shape, device) for t in given]
    assert all(torch.equal(there.cpu(), here) for there, here in zip(sent, given, strict=True))
    assert len(events.downloads) == 1
    assert nothing is None
    assert local is given[1]
    assert ids is not None and mask is not None
    assert torch.equal(ids, given[0])
    assert torch.equal(mask.bool(), given[1])
