"""Putting image features where their placeholders stand: pure tensor functions (spec/model.md §8.3).

A *slot* is the block of features `(n, D)` that one placeholder takes. Every placeholder uses one slot and every row
without a placeholder uses one too (it stays out of the text), so that each row keeps the projector in its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import RequestError

Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Spliced:
    """A batch after the splice, padded to one length T: embeddings `(B, T, D)`, mask `(B, T)` bool, positions and
    labels `(B, T)` int64 (`labels` is `None` when none were given)."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


def encode_slots(images: Images, encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """One `(n, D)` block a slot for every accepted layout of `images`.

    `(K, 3, H, W)`: K slots. `(B, k, 3, H, W)` or a list of `(k, 3, H, W)`: one slot an entry, its images in order.
    A list of `(3, H, W)`: one slot each. Images of one shape are encoded together.
    """
    if isinstance(images, Tensor) and images.dim() == 4:
        return list(encode(images).unbind(0))
    entries = [image.unsqueeze(0) if image.dim() == 3 else image for image in images]
    if any(entry.dim() != 4 for entry in entries):
        raise RequestError(f"images should be 4-D, 5-D or a list of 3-D or 4-D tensors, got {_shapes(images)}.")
    if len({entry.shape[1:] for entry in entries}) > 1:
        return [encode(entry).flatten(0, 1) for entry in entries]
    features = encode(torch.cat(entries))  # (sum k_i, n, D)
    blocks = torch.split(features, [len(entry) for entry in entries])
    return [block.flatten(0, 1) for block in blocks]


def encode_used_slots(images: Images, encode: Callable[[Tensor], Tensor], counts: Sequence[int]) -> list[Tensor]:
    """As `encode_slots`, but slots of rows without a placeholder (`counts` by row) are not computed: they get another
    one's block, which no text shows. One image is always encoded, so that every rank runs tower and projector (Z3-1).
    """
    used = [count > 0 for count in counts for _ in range(max(1, count))]
    if all(used):
        return encode_slots(images, encode)
    chosen = [slot for slot, wanted in enumerate(used) if wanted] or [0]
    some = images[chosen] if isinstance(images, Tensor) else [images[slot] for slot in chosen]
    blocks = dict(zip(chosen, encode_slots(some, encode), strict=True))
    return [blocks.get(slot, blocks[chosen[0]]) for slot in range(len(used))]


def _shapes(images: Images) -> str:
    return ", ".join(str(tuple(image.shape)) for image in images)


def check_slots(input_ids: Tensor, slots: int) -> list[int]:
    """The number of placeholders in each row; the rows must use exactly `slots` slots (M8)."""
    counts = [int(count) for count in (input_ids == IMAGE_TOKEN_INDEX).sum(dim=1)]
    used = sum(max(1, count) for count in counts)
    if used != slots:
        raise RequestError(
            f"The batch has {used} image slots (placeholders per row: {counts}; a row without one still takes one "
            f"slot), but {slots} images were given; give one image for each <image>."
        )
    return counts


def splice_row(embeds: Tensor, image_at: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Replace the marked positions of one row by slots.

    `embeds` `(T, D)`, `image_at` `(T,)` bool. Returns the expanded embeddings `(L, D)` and, for each of the L
    positions, the index it comes from or -1 for a feature `(L,)` int64.
    """
    pieces: list[Tensor] = []
    origin: list[Tensor] = []
    start = 0
    index = torch.arange(len(embeds), device=embeds.device)
    for slot, position in zip(slots, image_at.nonzero().flatten().tolist(), strict=True):
        pieces += [embeds[start:position], slot.to(embeds.device, embeds.dtype)]
        origin += [index[start:position], index.new_full((len(slot),), -1)]
        start = position + 1
    pieces.append(embeds[start:])
    origin.append(index[start:])
    return torch.cat(pieces), torch.cat(origin)


def splice_rows(
    input_ids: Tensor, embeds: Tensor, slots: Sequence[Tensor], mask: Tensor, labels: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Splice each row of a batch (`input_ids`, `mask`, `labels` `(B, T)`, `embeds` `(B, T, D)`), padding left out.

    Returns embeddings `(L_b, D)` and labels `(L_b,)`, -100 at features; no labels for none.
    """
    rows, row_labels, next_slot = [], [], 0
    for row, count in enumerate(check_slots(input_ids, len(slots))):
        taken = slots[next_slot : next_slot + max(1, count)]
        next_slot += max(1, count)
        kept = mask[row].nonzero().flatten()
        if count == 0 and len(kept):
            # an empty slice of the unused slot: the graph keeps tower and projector, the numbers do not change
            expanded, origin = embeds[row, kept], kept
            expanded = torch.cat([expanded, taken[0][:0].to(expanded)])
        else:
            image_at = input_ids[row, kept] == IMAGE_TOKEN_INDEX
            expanded, origin = splice_row(embeds[row, kept], image_at, taken if count else [])
            origin = torch.where(origin < 0, origin, kept[origin.clamp(min=0)])
        rows.append(expanded)
        if labels is not None:
            row_labels.append(torch.where(origin < 0, IGNORE_INDEX, labels[row].to(embeds.device)[origin.clamp(min=0)]))
    return rows, row_labels


def splice_batch(
    input_ids: Tensor,
    embeds: Tensor,
    slots: Sequence[Tensor],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    past_length: int = 0,
    padding_side: str = "right",
) -> Spliced:
    """Splice a batch: `input_ids`, `attention_mask`, `labels` `(B, T)`, `embeds` `(B, T, D)` of the text.

    Mask, labels and positions are expanded position by position like the text, with True, -100 and consecutive
    positions at features. Padding of the input is dropped and made anew on `padding_side` (left also when the input
    was padded left), with zero vectors and -100. With a past, positions continue after the past's real tokens and the
    mask covers the past too.
    """
    batch, length = input_ids.shape
    device = embeds.device
    past = torch.ones(batch, past_length, dtype=torch.bool, device=device)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        mask = attention_mask[:, -length:].to(device, torch.bool)
        if attention_mask.shape[1] == past_length + length:
            past = attention_mask[:, :past_length].to(device, torch.bool)
        if bool((~mask[:, 0] & mask[:, -1]).any()):
            padding_side = "left"
    rows, row_labels = splice_rows(input_ids, embeds, slots, mask, labels)
    valid = _pad([torch.ones(len(row), dtype=torch.bool, device=device) for row in rows], padding_side, False)
    full_mask = torch.cat([past, valid], dim=1)
    positions = (full_mask.long().cumsum(1) - 1).clamp(min=0)[:, past_length:]
    return Spliced(
        inputs_embeds=_pad(rows, padding_side, 0.0),
        attention_mask=full_mask,
        position_ids=positions,
        labels=_pad(row_labels, padding_side, IGNORE_INDEX) if labels is not None else None,
    )


def _pad(rows: Sequence[Tensor], side: str, value: float | bool) -> Tensor:
    """Stack rows `(L_i, …)` to `(B, max L, …)`, padded on one side."""
    longest = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), value)
    if all(len(row) == longest for row in rows):
        return torch.stack(list(rows))
    padded = []
    for row, blank in zip(rows, out):
        pad = blank[len(row) :]
        padded.append(torch.cat([pad, row] if side == "left" else [row, pad]))
    return torch.stack(padded)
