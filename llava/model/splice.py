"""Splicing of image features into text embeddings, as pure tensor functions.

A *slot* is the block of features `(n, D)` of one placeholder. A row without a placeholder also has a slot, which is
not inserted but keeps the projector in the row's graph.

The layout is computed on the host from one device-to-host copy of ids and mask, the only synchronisation of a batch.
Embeddings are assembled from views by one concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import RequestError
from llava.model.transfer import to_host, upload

Images = Tensor | Sequence[Tensor]
PADDING, TEXT, IMAGE = range(3)  # kinds of input tokens


@dataclass(frozen=True)
class Spliced:
    """A spliced batch, padded to length T: embeddings `(B, T, D)`, mask `(B, T)` bool, positions and labels `(B, T)`
    int64 (`labels` is `None` if none were given). `full` tells whether the mask is True everywhere."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    full: bool


@dataclass(frozen=True)
class SpliceLayout:
    """Runs of token kinds in each row of a batch `(B, T)`, as `(kind, length)`; each placeholder is a separate run.
    `counts` are the numbers of placeholders in each row."""

    rows: list[list[tuple[int, int]]]
    counts: list[int]

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor | None, slots: int | None = None) -> SpliceLayout:
        """The layout of `input_ids` and `mask` (`(B, T)`, on the CPU); the mask is 0 at padding.

        Raises `RequestError` if the rows do not use `slots` slots or the mask hides a placeholder. `slots` is `None`
        for a batch without images.
        """
        counts = check_slots(input_ids, slots) if slots is not None else [0] * len(input_ids)
        kinds = torch.where(input_ids == IMAGE_TOKEN_INDEX, IMAGE, TEXT)
        if mask is not None:
            if bool(((kinds == IMAGE) & ~mask.bool()).any()):
                raise RequestError("attention_mask is 0 at an <image> placeholder; it must be 1 there.")
            kinds = torch.where(mask.bool(), kinds, PADDING)
        starts = torch.ones_like(kinds, dtype=torch.bool)  # (B, T), where a run begins
        starts[:, 1:] = (kinds[:, 1:] != kinds[:, :-1]) | (kinds[:, 1:] == IMAGE)
        at = starts.flatten().nonzero().flatten()
        lengths = torch.diff(at, append=at.new_tensor([kinds.numel()]))
        rows: list[list[tuple[int, int]]] = [[] for _ in counts]
        for start, kind, length in torch.stack([at, kinds.flatten()[at], lengths], dim=1).tolist():
            rows[start // kinds.shape[1]].append((kind, length))
        return cls(rows, counts)

    def splice(self, values: Tensor, slots: Sequence[Tensor]) -> list[list[Tensor]]:
        """Split `values` `(B, T, ...)` into runs, drop padding, and insert `slots` `(n, ...)` at placeholders.

        Returns the pieces of each row, to be concatenated. A row without a placeholder gets an empty slice of its
        slot, which keeps tower and projector in the graph.
        """
        parts = iter(torch.split(values.flatten(0, 1), [length for row in self.rows for _, length in row]))
        unused = iter(slots)
        spliced = []
        for row, count in zip(self.rows, self.counts, strict=True):
            pieces: list[Tensor] = []
            for kind, _ in row:
                part = next(parts)
                if kind == TEXT:
                    pieces.append(part)
                elif kind == IMAGE:
                    pieces.append(next(unused).to(values))
            if count == 0 and slots:
                pieces.append(next(unused)[:0].to(values))
            spliced.append(pieces)
        return spliced


def encode_slots(images: Images, encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Encode `images` to one block `(n, D)` per slot.

    Accepted layouts: `(K, 3, H, W)` or a list of `(3, H, W)`, one slot per image; `(B, k, 3, H, W)` or a list of
    `(k, 3, H, W)`, one slot per entry, with its images in order. Images of one shape are encoded together.
    """
    if isinstance(images, Tensor) and images.dim() == 4:
        return list(encode(images).unbind(0))
    entries = [image.unsqueeze(0) if image.dim() == 3 else image for image in images]
    if any(entry.dim() != 4 for entry in entries):
        raise RequestError(f"images must be 4-D, 5-D or a list of 3-D or 4-D tensors, got {_shapes(images)}.")
    if len({entry.shape[1:] for entry in entries}) > 1:
        return [encode(entry).flatten(0, 1) for entry in entries]
    features = encode(torch.cat(entries))  # (sum k_i, n, D)
    blocks = torch.split(features, [len(entry) for entry in entries])
    return [block.flatten(0, 1) for block in blocks]


def encode_used_slots(images: Images, encode: Callable[[Tensor], Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Encode only the slots that are inserted; `counts` are the numbers of placeholders in each row.

    The slot of a row without a placeholder reuses the features of another slot, which does not change values. One image
    is always encoded, so that every rank joins the collectives of tower and projector.
    """
    used = [count > 0 for count in counts for _ in range(max(1, count))]
    if all(used):
        return encode_slots(images, encode)
    chosen = [slot for slot, wanted in enumerate(used) if wanted] or [0]
    if isinstance(images, Tensor):
        some: Images = images.index_select(0, upload([torch.tensor(chosen)], images.device)[0])
    else:
        some = [images[slot] for slot in chosen]
    blocks = dict(zip(chosen, encode_slots(some, encode), strict=True))
    return [blocks.get(slot, blocks[chosen[0]]) for slot in range(len(used))]


def _shapes(images: Images) -> str:
    return ", ".join(str(tuple(image.shape)) for image in images)


def check_slots(input_ids: Tensor, slots: int) -> list[int]:
    """Return the number of placeholders in each row; raise `RequestError` unless the rows use `slots` slots."""
    counts: list[int] = (input_ids == IMAGE_TOKEN_INDEX).sum(dim=1).tolist()
    used = sum(max(1, count) for count in counts)
    if used != slots:
        raise RequestError(
            f"The batch has {used} image slots (placeholders per row: {counts}; a row without one has one slot), but "
            f"{slots} images were given; pass one image per <image>."
        )
    return counts


def splice_prompt(ids: Sequence[int], slots: Sequence[Tensor], embed: Callable[[list[int]], Tensor]) -> Tensor:
    """Embed one prompt to `(L, D)`: `embed` maps the M text ids to `(M, D)`, and `slots` replace the placeholders."""
    at = [index for index, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
    if len(at) != len(slots):
        raise RequestError(
            f"The prompt has {len(at)} <image> placeholders, but {len(slots)} images were given; they must match."
        )
    text = embed([token for token in ids if token != IMAGE_TOKEN_INDEX])
    borders = [-1, *at, len(ids)]
    first, *others = torch.split(text, [end - start - 1 for start, end in pairwise(borders)])
    pieces = [first]
    for slot, part in zip(slots, others, strict=True):
        pieces += [slot.to(text), part]
    return torch.cat(pieces)


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
    """Splice a batch of ids, mask and labels `(B, T)` and text embeddings `(B, T, D)`.

    At features, the mask is True, labels are -100, and positions are consecutive. Padding is dropped and added again on
    `padding_side` (left if the input is padded left), with zero vectors and -100. With a past, positions continue after
    its real tokens and the mask includes it. Pass ids, mask and labels on the CPU if available.
    """
    ids, given, host_labels = to_host(input_ids, attention_mask, labels)
    assert ids is not None
    batch, length = ids.shape
    past, mask = torch.ones(batch, past_length, dtype=torch.bool), None
    if given is not None:
        mask = given[:, -length:].bool()
        if given.shape[1] == past_length + length:
            past = given[:, :past_length].bool()
        if bool((~mask[:, 0] & mask[:, -1]).any()):
            padding_side = "left"
    layout = SpliceLayout.of(ids, mask, len(slots))
    rows = layout.splice(embeds, slots)
    lengths = [sum(map(len, row)) for row in rows]
    valid = [[torch.ones(count, dtype=torch.bool)] for count in lengths]
    full_mask = torch.cat([past, _pad(valid, lengths, padding_side, False)], dim=1)
    host = [full_mask, (full_mask.long().cumsum(1) - 1).clamp(min=0)[:, past_length:]]
    if host_labels is not None:
        row_labels = layout.splice(host_labels, [host_labels.new_full((len(slot),), IGNORE_INDEX) for slot in slots])
        host.append(_pad(row_labels, lengths, padding_side, IGNORE_INDEX))
    tensors = upload(host, embeds.device)
    return Spliced(
        inputs_embeds=_pad(rows, lengths, padding_side, 0.0),
        attention_mask=tensors[0],
        position_ids=tensors[1],
        labels=tensors[2] if labels is not None else None,
        full=bool(full_mask.all()),
    )


def _pad(rows: Sequence[Sequence[Tensor]], lengths: Sequence[int], side: str, value: float | bool) -> Tensor:
    """Concatenate the pieces of each row `(L_i, ...)` and pad the rows on one side: `(B, max L, ...)`."""
    longest = max(lengths)
    like = rows[0][0]
    blank = like.new_full((longest - min(lengths), *like.shape[1:]), value)
    pieces: list[Tensor] = []
    for row, length in zip(rows, lengths, strict=True):
        pad = blank[: longest - length]
        pieces += [pad, *row] if side == "left" else [*row, pad]
    return torch.cat(pieces).view(len(rows), longest, *like.shape[1:])
