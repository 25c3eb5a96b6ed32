"""Records and distinct images of annotation files, for checks of whole training sets; takes 18 bytes per image."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llava.data.annotations import read_records
from llava.data.records import ImageFile, Record, parse_record
from llava.errors import DataError


class TrainingSet:
    """The distinct images of annotation files in the order of their records, each a path or the content of a file.

    `bad` maps malformed records, which are left out, to their first problem. Records are numbered over all files.
    """

    def __init__(self, datasets: Sequence[tuple[Path, Path | None]]) -> None:
        self.files = [(file, read_records(file), folder or file.parent) for file, folder in datasets]
        self._first = np.cumsum([0, *(len(records) for _, records, _ in self.files)]).tolist()
        self.bad: dict[int, str] = {}
        digests, records, slots = array("Q"), array("I"), array("H")
        for number, record in self.records():
            for slot, image in enumerate(record.image):
                source = self._source(number, image)
                name = source if isinstance(source, bytes) else str(source).encode("utf-8", "surrogateescape")
                digests.append(int.from_bytes(blake2b(name, digest_size=8).digest(), "little"))
                records.append(number)
                slots.append(slot)
        self._records, self._slots = np.array(records, np.int32), np.array(slots, np.uint16)
        _, first, inverse = np.unique(np.array(digests, np.uint64), return_index=True, return_inverse=True)
        order = np.argsort(first)
        self._references = first[order].astype(np.int32)
        self._images = np.argsort(order).astype(np.int32)[inverse]  # the image of each reference
        self._by_image = np.argsort(self._images, kind="stable").astype(np.int32)

    @property
    def record_count(self) -> int:
        return int(self._first[-1])

    def records(self) -> Iterator[tuple[int, Record]]:
        """The valid records with their numbers."""
        for number in range(self.record_count):
            try:
                yield number, self.record(number)
            except DataError as error:
                self.bad[number] = str(error.args[0])

    def record(self, number: int) -> Record:
        file, index = self._place(number)
        return parse_record(self.files[file][1][index])

    def place(self, number: int) -> str:
        """File and index of a record."""
        file, index = self._place(number)
        return f"{self.files[file][0]}:{index}"

    def _place(self, number: int) -> tuple[int, int]:
        file = bisect_right(self._first, number) - 1
        return file, number - self._first[file]

    def _source(self, number: int, image: ImageFile) -> Path | bytes:
        return image if isinstance(image, bytes) else self.files[self._place(number)[0]][2] / image

    def __len__(self) -> int:
        return len(self._references)

    def load(self, index: int) -> Path | bytes:
        reference = self._references[index]
        number = int(self._records[reference])
        return self._source(number, self.record(number).image[int(self._slots[reference])])

    def name(self, index: int) -> str:
        """Path of an image, or the place of its record if the record contains it."""
        source = self.load(index)
        return f"image of {self.place(self.records_of(index)[0])}" if isinstance(source, bytes) else str(source)

    def images_of(self, number: int) -> list[int]:
        """Images of a record."""
        start, stop = bisect_left(self._records, number), bisect_right(self._records, number)
        return [int(each) for each in self._images[start:stop]]

    def records_of(self, index: int) -> list[int]:
        """Records that have an image."""
        image_of = self._images.__getitem__
        start = bisect_left(self._by_image, index, key=image_of)
        stop = bisect_right(self._by_image, index, key=image_of)
        return [int(each) for each in np.unique(self._records[self._by_image[start:stop]])]
