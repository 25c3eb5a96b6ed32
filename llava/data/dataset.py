"""The supervised dataset: records opened when asked for, and nothing replaced in silence (spec/train.md §5, T1)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.trainer_utils import seed_worker

from llava import conversation
from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, get_template, image_placeholder
from llava.data.annotations import read_records
from llava.data.dataset_scan import DatasetScan, Findings
from llava.data.labels import Example, build_example, check_template, place_images, truncate
from llava.data.records import Record, Turn, parse_record
from llava.errors import ConfigError, DataError, ImageError, LlavaError, TemplateError
from llava.images import open_image, preprocess_image


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


# --- The supervised dataset -------------------------------------------------------------------------------------------


logger = logging.getLogger(__name__)

_FAULTS: Final = ("bad", "truncated", "unsupervised")
_KNOWN_KEYS: Final = frozenset({"id", "image", "conversations"})
_MAX_BAD: Final = 0.05  # of the records; more than this, and more than _FREE, is a wrong folder and not bad luck
_FREE: Final = 10
Merge = Callable[[torch.Tensor], torch.Tensor]
_NEAR: Final = 1000  # so many records are parsed to find one of the same modality


class LazySupervisedDataset(Dataset[dict[str, torch.Tensor]]):
    """Items `input_ids` (T,), `labels` (T,) and, in a multimodal run, `image`: (3, S, S), or (k, 3, S, S) for a list.

    Text-only records of a multimodal run carry zeros. Records are checked when the dataset is made, those of a large
    file by processes beside it (`check` tells what they found); images when they are opened. A bad record raises
    `DataError` naming file, index and remedy, or with `on_bad_sample == "skip"` gives way to the next good one, of its
    modality where one is near, until too many are bad.
    """

    def __init__(
        self, data_path: str, tokenizer: Any, data_args: Any, template: Conversation | str | None = None
    ) -> None:
        self.data_path = data_path
        self.tokenizer = tokenizer
        self.data_args = data_args
        template = get_template(template) if isinstance(template, str) else template
        self.template = template or conversation.default_conversation
        self.records = read_records(data_path)
        self.skip_bad = getattr(data_args, "on_bad_sample", "error") == "skip"
        # One flag a record and fault, shared with the loader's workers; setting one twice changes nothing.
        self._flags = torch.zeros(len(_FAULTS), len(self.records), dtype=torch.uint8)
        self._flags.share_memory_()  # type: ignore[no-untyped-call]
        self._survey = DatasetScan(self.records)
        self._checked = False
        self.check()

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def lengths(self) -> list[int]:
        """Words of a record, plus 128 with an image; 0 for a bad one."""
        found = self._findings()
        lengths: list[int] = (found.words + 128 * found.image).tolist()
        return lengths

    @cached_property
    def modality_lengths(self) -> list[int]:
        """Words of a record, negative without an image."""
        found = self._findings()
        lengths: list[int] = np.where(found.image, found.words, -found.words).tolist()
        return lengths

    def check(self, *, wait: bool = False) -> bool:
        """Raise or skip what the look through all records has found, once it is known; whether it is.

        With `wait`, it is waited for.
        """
        if not self._checked and (wait or self._survey.ready()):
            self._checked = True
            self._judge(self._survey.result())
        return self._checked

    def _findings(self) -> Findings:
        self.check(wait=True)
        return self._survey.result()

    def _judge(self, found: Findings) -> None:
        unknown = sorted(found.keys - _KNOWN_KEYS)
        if unknown:
            logger.warning("%s: keys %s are not used.", self.data_path, ", ".join(map(repr, unknown)))
        with_image = [] if self.data_args.is_multimodal else np.flatnonzero(found.image).tolist()
        for index in sorted([*found.problems, *with_image]):
            try:
                self._record(index)
            except DataError as error:
                if not self.skip_bad:
                    raise
                self._skip(index, error)
        if bool(self._flags[0].all()):
            raise DataError(f"{self.data_path} holds no usable record; the reasons are logged above.")

    def report(self, merge: Merge = torch.Tensor.long) -> dict[str, int]:
        """How many records of this process and its workers were bad, truncated, or without a supervised token.

        `merge` makes of one flag a fault and record, (F, N), those that any process has set.
        """
        self.check(wait=True)
        return dict(zip(_FAULTS, merge(self._flags).sum(1).tolist()))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not self.skip_bad:
            return self._load(index)
        for candidate in self._candidates(index % len(self)):
            try:
                return self._load(candidate)
            except DataError as error:
                self._skip(candidate, error)
        raise DataError(f"{self.data_path} holds no record to stand in for record {index}; repair the data.")

    def _candidates(self, index: int) -> Iterator[int]:
        """The record itself, then those that follow it and are not known to be bad, those of its modality first."""
        has_image = self._has_image(index)
        for of_any_kind in (False, True):
            for step in range(len(self) if of_any_kind else min(_NEAR, len(self))):
                candidate = (index + step) % len(self)
                if not self._flags[0, candidate] and (of_any_kind or self._has_image(candidate) == has_image):
                    yield candidate

    def _has_image(self, index: int) -> bool:
        try:
            raw = self.records[index]
        except DataError:
            return False
        return isinstance(raw, Mapping) and bool(raw.get("image"))

    def _skip(self, index: int, error: DataError) -> None:
        self._flags[0, index] = 1
        bad, limit = int(self._flags[0].sum()), max(_FREE, int(_MAX_BAD * len(self)))
        if bad <= _FREE:
            logger.warning("Skipped: %s", error)
        if bad > limit:
            raise ConfigError(
                f"{bad} of {len(self)} records of {self.data_path} are bad, more than the {limit} that may be skipped; "
                f"the last: {error.args[0]}"
            ) from error

    def _record(self, index: int) -> Record:
        try:
            record = parse_record(self.records[index])
            if record.image and not self.data_args.is_multimodal:
                raise DataError("it has an image, but the run has no --vision_tower")
        except DataError as error:
            raise self._located(error, index) from error
        return record

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        record = self._record(index)
        try:
            example = self.example(record)
            item = truncate(example, self.tokenizer.model_max_length)._asdict()
            if self.data_args.is_multimodal:
                item["image"] = self._pixels(record)
        except (DataError, TemplateError) as error:
            raise self._located(error, index) from error
        self._flags[1, index] |= len(item["input_ids"]) < len(example.input_ids)
        self._flags[2, index] |= not bool((item["labels"] != IGNORE_INDEX).any())
        return item

    def example(self, record: Record) -> Example:
        """Ids and labels of a record before truncation; its images are not opened."""
        start_end = getattr(self.data_args, "mm_use_im_start_end", False)
        return record_example(record, self.tokenizer, self.template, start_end=start_end)

    def _pixels(self, record: Record) -> torch.Tensor:
        processor = self.data_args.image_processor
        if not record.image:
            return torch.zeros(3, processor.crop_size["height"], processor.crop_size["width"])
        folder = Path(self.data_args.image_folder or "")
        images = [
            preprocess_image(open_image(folder / path), processor, self.data_args.image_aspect_ratio)
            for path in record.image
        ]
        return images[0] if len(images) == 1 else torch.stack(images)  # (3, S, S) or (k, 3, S, S)

    def _located(self, error: LlavaError, index: int) -> DataError:
        kind = ImageError if isinstance(error, ImageError) else DataError
        remedy = "repair it" if self.skip_bad else "repair it, check --image_folder, or pass --on_bad_sample skip"
        return kind(f"{self.data_path}, record {index}: {str(error.args[0]).rstrip('.')}; {remedy}.")


def record_example(record: Record, tokenizer: Any, template: Conversation, *, start_end: bool = False) -> Example:
    """Ids and labels of a record before truncation (spec/train.md §4.1, §4.2)."""
    placeholder = image_placeholder(template, start_end)
    turns = [Turn(role, place_images(text, placeholder, len(record.image))) for role, text in record.turns]
    return build_example(turns, tokenizer, template, has_image=bool(record.image))


def start_worker(worker_id: int) -> None:
    """What a loader's worker does first: its own random state, and no collector that would copy the shared memory.

    Collecting writes to every object, and what a forked process writes to becomes its own.
    """
    gc.freeze()
    seed_worker(worker_id)


def check_supervision(dataset: LazySupervisedDataset, first: int = 1000) -> None:
    """Raise `DataError` if more than 1 % of the first records would teach nothing (users.md TOK-2)."""
    count = min(first, len(dataset))
    empty = []
    for index in range(count):
        try:
            example = dataset.example(parse_record(dataset.records[index]))
            labels = truncate(example, dataset.tokenizer.model_max_length).labels
        except (DataError, TemplateError):
            continue  # counted and reported when it is drawn
        if not bool((labels != IGNORE_INDEX).any()):
            empty.append(index)
    if len(empty) > max(1, count // 100):
        raise DataError(
            f"{len(empty)} of the first {count} records of {dataset.data_path} have no supervised token, the first "
            f"is {empty[0]}; their answers are empty or beyond --model_max_length {dataset.tokenizer.model_max_length}."
        )


def make_supervised_data_module(
    tokenizer: Any, data_args: Any, template: Conversation | str | None = None
) -> dict[str, Any]:
    """Dataset and collator for the Trainer, after checking the template and the labels of the first records."""
    dataset = LazySupervisedDataset(data_args.data_path, tokenizer, data_args, template)
    check_template(tokenizer, dataset.template)
    check_supervision(dataset)
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}
