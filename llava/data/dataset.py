"""Supervised datasets, their mixtures and the collator; records and images are loaded on access."""

from __future__ import annotations

import bisect
import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset
from transformers.trainer_utils import seed_worker

from llava import conversation
from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, get_template, image_placeholder
from llava.data.annotations import read_records
from llava.data.dataset_scan import DatasetScan, ScanResult
from llava.data.labels import (
    Example,
    build_example,
    check_room,
    check_template,
    count_ids,
    place_images,
    truncate,
)
from llava.data.mixture import Entry, read_mixture
from llava.data.records import Record, Turn, has_image, parse_record
from llava.errors import ConfigError, DataError, ImageError, LlavaError, TemplateError
from llava.images import open_image, preprocess_image

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from llava.arguments import DataArguments

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor | list[torch.Tensor]]
Merge = Callable[[torch.Tensor], torch.Tensor]
Sizes = npt.NDArray[np.int32]
_COUNTERS: Final = ("bad", "truncated", "unsupervised")
_MAX_BAD: Final = 0.05  # fraction of the records that may be skipped,
_ALWAYS_ALLOWED: Final = 10  # or this number
_SAME_MODALITY_WITHIN: Final = 1000  # records searched for a replacement of the same modality


class LazySupervisedDataset(Dataset[dict[str, torch.Tensor]]):
    """Items `input_ids` (T,), `labels` (T,) and, in a multimodal run, `image`: (3, S, S), or (k, 3, S, S) for k images.

    Text-only records of a multimodal run get an image of zeros. Records are validated by a `DatasetScan` started by the
    constructor, whose problems `check` reports; images are validated when loaded. A bad record raises `DataError` with
    its file, index and remedy. With `on_bad_sample == "skip"` the next good record replaces it, preferably of the same
    modality, and `ConfigError` is raised when too many are bad.
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        data_args: DataArguments,
        template: Conversation | str | None = None,
    ) -> None:
        self.data_path = data_path
        self.tokenizer = tokenizer
        self.data_args = data_args
        template = get_template(template) if isinstance(template, str) else template
        self.template = template or conversation.default_conversation
        self.records = read_records(data_path)
        self.skip_bad = getattr(data_args, "on_bad_sample", "error") == "skip"
        # A flag per counter and record in memory shared with data loader workers; setting a flag is idempotent.
        self._flags = torch.zeros(len(_COUNTERS), len(self.records), dtype=torch.uint8)
        self._flags.share_memory_()  # type: ignore[no-untyped-call]
        self._scan = DatasetScan(self.records)
        self._checked = False
        self.check()

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def lengths(self) -> list[int]:
        """Words of each record, plus 128 with an image; 0 for a bad record."""
        result = self._scan_result()
        return cast("list[int]", (result.words + 128 * result.image).tolist())

    @cached_property
    def modality_lengths(self) -> list[int]:
        """Words of each record, negative without an image."""
        result = self._scan_result()
        return cast("list[int]", np.where(result.image, result.words, -result.words).tolist())

    @cached_property
    def _sizes(self) -> Sizes:
        return np.full((len(self), 2), -1, np.int32)

    def sizes(self, indices: Sequence[int]) -> Sizes:
        """Ids after truncation, and images, of records: (len(indices), 2); cached, and the same in all processes.

        No image is opened. With `on_bad_sample == "skip"`, a record whose text is bad has the sizes of its replacement.
        """
        wanted = np.asarray(indices, np.int64)
        for index in np.unique(wanted[self._sizes[wanted, 0] < 0]).tolist():
            self._sizes[index] = self._measure(index)
        return self._sizes[wanted]

    def _measure(self, index: int) -> tuple[int, int]:
        for candidate in self._candidates(index, known_bad=False) if self.skip_bad else [index]:
            try:
                return self._size(candidate)
            except DataError:
                if not self.skip_bad:
                    raise
        raise self._no_replacement(index)

    def _size(self, index: int) -> tuple[int, int]:
        record = self._record(index)
        images, limit = len(record.image), self.tokenizer.model_max_length
        try:
            turns = turns_with_images(record, self.template, start_end=self._start_end)
            count = count_ids(turns, self.tokenizer, self.template, has_image=images > 0)
            if count > limit:
                check_room(images, limit)
        except (DataError, TemplateError) as error:
            raise self._located(error, index) from error
        return min(count, limit), images

    def check(self, *, wait: bool = False) -> bool:
        """Raise or skip the bad records found by the scan, once it is complete; returns whether it is.

        `wait` waits for the scan.
        """
        if not self._checked and (wait or self._scan.ready()):
            self._checked = True
            self._apply(self._scan.result())
        return self._checked

    def _scan_result(self) -> ScanResult:
        self.check(wait=True)
        return self._scan.result()

    def _apply(self, result: ScanResult) -> None:
        for text in result.unused_keys():
            logger.warning("%s: %s.", self.data_path, text)
        with_image = [] if self.data_args.is_multimodal else np.flatnonzero(result.image).tolist()
        for index in sorted([*result.problems, *with_image]):
            try:
                self._record(index)
            except DataError as error:
                if not self.skip_bad:
                    raise
                self._skip(index, error)
        if bool(self._flags[0].all()):
            raise DataError(f"{self.data_path} holds no usable record; the log lists the reasons.")

    def report(self, merge: Merge = torch.Tensor.long) -> dict[str, int]:
        """Numbers of bad, truncated and unsupervised records seen by this process and its workers.

        `merge` combines the flags (counters, N) of all processes.
        """
        self.check(wait=True)
        return dict(zip(_COUNTERS, merge(self._flags).sum(1).tolist()))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not self.skip_bad:
            return self._load(index)
        for candidate in self._candidates(index % len(self)):
            try:
                return self._load(candidate)
            except DataError as error:
                self._skip(candidate, error)
        raise self._no_replacement(index)

    def _no_replacement(self, index: int) -> DataError:
        return DataError(f"{self.data_path} holds no replacement for record {index}; repair the data.")

    def _candidates(self, index: int, *, known_bad: bool = True) -> Iterator[int]:
        """The record and its successors, first those of its modality, without those `known_bad` to this process."""
        has_image = self._has_image(index)
        for any_modality in (False, True):
            for step in range(len(self) if any_modality else min(_SAME_MODALITY_WITHIN, len(self))):
                candidate = (index + step) % len(self)
                if known_bad and self._flags[0, candidate]:
                    continue
                if any_modality or self._has_image(candidate) == has_image:
                    yield candidate

    def _has_image(self, index: int) -> bool:
        try:
            return has_image(self.records[index])
        except DataError:
            return False

    def _skip(self, index: int, error: DataError) -> None:
        self._flags[0, index] = 1
        bad, limit = int(self._flags[0].sum()), max(_ALWAYS_ALLOWED, int(_MAX_BAD * len(self)))
        if bad <= _ALWAYS_ALLOWED:
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
                raise DataError("the record has an image, but the run has no --vision_tower")
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
        return record_example(record, self.tokenizer, self.template, start_end=self._start_end)

    @property
    def _start_end(self) -> bool:
        return bool(getattr(self.data_args, "mm_use_im_start_end", False))

    def _pixels(self, record: Record) -> torch.Tensor:
        processor: BaseImageProcessor = getattr(self.data_args, "image_processor", None)
        if not record.image:
            return torch.zeros(3, processor.crop_size["height"], processor.crop_size["width"])
        folder = Path(self.data_args.image_folder or "")
        aspect_ratio = self.data_args.image_aspect_ratio
        sources = [image if isinstance(image, bytes) else folder / image for image in record.image]
        images = [preprocess_image(open_image(source), processor, aspect_ratio) for source in sources]
        return images[0] if len(images) == 1 else torch.stack(images)

    def _located(self, error: LlavaError, index: int) -> DataError:
        kind = ImageError if isinstance(error, ImageError) else DataError
        remedy = "repair it" if self.skip_bad else "repair it, check --image_folder, or pass --on_bad_sample skip"
        return kind(f"{self.data_path}, record {index}: {str(error.args[0]).rstrip('.')}; {remedy}.")


class MixtureDataset(ConcatDataset[dict[str, torch.Tensor]]):
    """Concatenation of the datasets of a mixture, each `repeat_time` times; items as in `LazySupervisedDataset`."""

    def __init__(
        self, entries: list[Entry], tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, template: Conversation
    ):
        self.parts: dict[str, LazySupervisedDataset] = {}
        for entry in entries:
            args = copy.copy(data_args)
            args.data_path, args.image_folder = entry.annotation, entry.root
            self.parts[entry.name] = LazySupervisedDataset(entry.annotation, tokenizer, args, template)
        super().__init__([self.parts[entry.name] for entry in entries for _ in range(entry.repeat_time)])
        for entry in entries:
            count, repeats = len(self.parts[entry.name]), entry.repeat_time
            logger.info("%s: %d samples x %d, %.2f %%", entry.name, count, repeats, 100 * count * repeats / len(self))

    def record_of(self, index: int) -> tuple[int, int]:
        """Identifier of the dataset and index in it of a sample; equal for all its repeats."""
        part = bisect.bisect_right(self.cumulative_sizes, index)
        return id(self.datasets[part]), index - (self.cumulative_sizes[part - 1] if part else 0)

    def sizes(self, indices: Sequence[int]) -> Sizes:
        """As `LazySupervisedDataset.sizes`; a record is measured once for all its repeats."""
        wanted = np.asarray(indices, np.int64)
        parts = np.searchsorted(self.cumulative_sizes, wanted, side="right")
        found = np.empty((len(wanted), 2), np.int32)
        for part in np.unique(parts).tolist():
            start = self.cumulative_sizes[part - 1] if part else 0
            found[parts == part] = self._repeated()[part].sizes(wanted[parts == part] - start)
        return found

    @cached_property
    def lengths(self) -> list[int]:
        return [length for part in self._repeated() for length in part.lengths]

    @cached_property
    def modality_lengths(self) -> list[int]:
        return [length for part in self._repeated() for length in part.modality_lengths]

    def _repeated(self) -> list[LazySupervisedDataset]:
        return cast("list[LazySupervisedDataset]", self.datasets)

    def check(self, *, wait: bool = False) -> bool:
        """Whether the scans of all datasets are complete; raises as `LazySupervisedDataset.check` does."""
        complete = [part.check(wait=wait) for part in self.parts.values()]  # checks all of them
        return all(complete)

    def report(self, merge: Merge = torch.Tensor.long) -> dict[str, int]:
        """Sum of the datasets' reports, without repeats."""
        reports = [part.report(merge) for part in self.parts.values()]
        return {key: sum(report[key] for report in reports) for key in reports[0]}


def record_example(
    record: Record, tokenizer: PreTrainedTokenizerBase, template: Conversation, *, start_end: bool = False
) -> Example:
    """Ids and labels of a record before truncation; `start_end` wraps images in `<im_start>` and `<im_end>`."""
    turns = turns_with_images(record, template, start_end=start_end)
    return build_example(turns, tokenizer, template, has_image=bool(record.image))


def turns_with_images(record: Record, template: Conversation, *, start_end: bool) -> list[Turn]:
    """The turns of a record with image placeholders as the template has them."""
    placeholder = image_placeholder(template, start_end)
    return [turn._replace(text=place_images(turn.text, placeholder, len(record.image))) for turn in record.turns]


@dataclass
class DataCollatorForSupervisedDataset:
    """Truncates rows to the tokenizer's `model_max_length` and pads them on the right to the longest."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[dict[str, torch.Tensor]]) -> Batch:
        """`input_ids`, `labels` (B, T) int64, `attention_mask` (B, T) bool and, with images, `images`.

        `images` (K, 3, S, S) are those of all rows in order, or a list if sizes differ; a row has at least one. Raises
        `DataError` if only some rows have images.
        """
        limit = self.tokenizer.model_max_length
        rows = [truncate(Example(item["input_ids"], item["labels"]), limit) for item in instances]
        pad = self.tokenizer.pad_token_id or 0  # hidden by the mask
        input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=pad)
        labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
        lengths = torch.tensor([len(row.input_ids) for row in rows])  # (B,)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        batch: Batch = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        with_image = [item["image"] for item in instances if "image" in item]
        if with_image and len(with_image) < len(instances):
            raise DataError(
                f"{len(with_image)} of {len(instances)} rows of a batch have an image; in a multimodal run each row "
                "needs one, zeros for text."
            )
        images = [pixels for item in with_image for pixels in (item if item.ndim == 4 else [item])]
        if images:
            batch["images"] = torch.stack(images) if len({image.shape for image in images}) == 1 else images
        return batch


def start_worker(worker_id: int) -> None:
    """Initialize a data loader worker: seed it, and freeze the garbage collector's view of inherited objects.

    A collection would write to their headers and thereby copy the memory shared with the parent process.
    """
    gc.freeze()
    seed_worker(worker_id)


def check_supervision(dataset: LazySupervisedDataset, first: int = 1000) -> None:
    """Raise `DataError` if more than 1 % of the first records have no supervised token."""
    count, limit = min(first, len(dataset)), dataset.tokenizer.model_max_length
    empty, truncated = [], []
    for index in range(count):
        try:
            example = dataset.example(parse_record(dataset.records[index]))
            labels = truncate(example, limit).labels
        except (DataError, TemplateError):
            continue  # reported when it is loaded
        if len(labels) < len(example.labels):
            truncated.append(index)
        if not bool((labels != IGNORE_INDEX).any()):
            empty.append(index)
    if len(empty) > max(1, count // 100):
        raise DataError(
            f"{len(empty)} of the first {count} records of {dataset.data_path} have no supervised token, the first is "
            f"{empty[0]}; their answers are empty, have weight 0, or lie beyond --model_max_length {limit}."
        )
    for indices, fault in ((truncated, f"are truncated to --model_max_length {limit}"), (empty, "have no answer left")):
        if indices:
            logger.info(
                *("%d of the first %d records of %s %s, the first is %d.", len(indices), count, dataset.data_path),
                *(fault, indices[0]),
            )


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, template: Conversation | str | None = None
) -> dict[str, Any]:
    """Dataset of `data_path`, or mixture of `meta_path`, and collator for the Trainer.

    Raises `TemplateError` or `DataError` if no answers can be learned.
    """
    template = get_template(template) if isinstance(template, str) else template or conversation.default_conversation
    check_template(tokenizer, template)
    dataset: MixtureDataset | LazySupervisedDataset
    if meta_path := getattr(data_args, "meta_path", None):
        dataset = MixtureDataset(read_mixture(meta_path), tokenizer, data_args, template)
    else:
        dataset = LazySupervisedDataset(data_args.data_path or "", tokenizer, data_args, template)
    for part in dataset.parts.values() if isinstance(dataset, MixtureDataset) else [dataset]:
        check_supervision(part)
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}
