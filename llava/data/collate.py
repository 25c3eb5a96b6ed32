"""Batches of supervised items (spec/train.md §5; T13: padding is known from lengths, never from ids)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX
from llava.data.labels import Example, truncate
from llava.errors import DataError


@dataclass
class DataCollatorForSupervisedDataset:
    """Right-pads ids and labels to the longest row, cut to the tokenizer's `model_max_length`."""

    tokenizer: Any

    def __call__(self, instances: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """`input_ids`, `labels` (B, T) int64, `attention_mask` (B, T) bool and, with images, `images`.

        `images` (K, 3, S, S) are the slots of all rows in order, a row bringing one or as many as it has images; a
        list when sizes differ. Raises `DataError` when only some rows have one.
        """
        limit = self.tokenizer.model_max_length
        rows = [truncate(Example(item["input_ids"], item["labels"]), limit) for item in instances]
        pad = self.tokenizer.pad_token_id or 0  # any id will do, the mask hides it
        input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=pad)  # (B, T)
        labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORE_INDEX)  # (B, T)
        lengths = torch.tensor([len(row.input_ids) for row in rows])  # (B,)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]  # (B, T)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        images = [slot for item in instances if "image" in item for slot in _slots(item["image"])]
        if images:
            with_image = sum("image" in item for item in instances)
            if with_image < len(instances):
                raise DataError(
                    f"{with_image} of {len(instances)} rows of a batch carry an image; a multimodal run needs one in "
                    "each, zeros for text."
                )
            batch["images"] = torch.stack(images) if len({image.shape for image in images}) == 1 else images
        return batch


def _slots(image: torch.Tensor) -> list[torch.Tensor]:
    return list(image) if image.ndim == 4 else [image]
