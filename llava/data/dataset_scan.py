"""Validation of all records of an annotation file in parallel processes: problems, word counts, records with images.

Training starts while the scan is running and is notified of problems later; `llava check` waits for it. The processes
(`python -m llava.data.dataset_scan`) share the memory-mapped file and import neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from llava.data.annotations import JsonRecords, Records, read_records
from llava.data.records import COMMON_KEYS, ImageFile, Record, parse_record, problems_of, quick_check, unused_keys
from llava.errors import DataError
from llava.utils import guarded, usable_cores

INLINE_RECORDS: Final = 20_000  # files of so many records are scanned in this process, in about a second,
INLINE_IMAGES: Final = 500  # or of so many if images are checked
BLOCK: Final = 256  # records whose words are counted together
# Classes of UTF-8 bytes: 2 whitespace, 1 the first byte of characters such as U+00A0, U+2009 and U+3000, 0 others
BYTE_CLASSES: Final = bytes(
    2 if chr(b).isspace() and b < 128 else int(b in (0xC2, 0xE1, 0xE2, 0xE3)) for b in range(256)
)
RecordCheck = Callable[[Record], list[str]]


@dataclass
class ScanResult:
    """Contents of N records: `words` (N,) int32 and `image` (N,) bool, zero for bad records, and problems by index.

    `keys` are those that are not used, with the number of their records and the index of the first.
    """

    words: npt.NDArray[np.int32]
    image: npt.NDArray[np.bool_]
    problems: dict[int, list[str]] = field(default_factory=dict)
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_key(self, key: str, count: int, first: int) -> None:
        before, index = self.keys.get(key, (0, first))
        self.keys[key] = before + count, min(index, first)

    def unused_keys(self) -> list[str]:
        """A line for each key that is not used."""
        return [f"key {key!r} is not used ({n} x, first in record {at})" for key, (n, at) in sorted(self.keys.items())]


def scan_records(records: Records, start: int, stop: int, check: RecordCheck | None = None) -> ScanResult:
    """Scan the records [start, stop); `check` returns further problems of a valid record, such as missing images."""
    result = ScanResult(np.zeros(stop - start, np.int32), np.zeros(stop - start, np.bool_))
    for block in range(start, stop, BLOCK):
        indices = range(block, min(block + BLOCK, stop))
        texts = [_scan_record(records, index, check, result, index - start) for index in indices]
        result.words[block - start : block - start + len(texts)] = count_words(texts)
    return result


def _scan_record(records: Records, index: int, check: RecordCheck | None, result: ScanResult, row: int) -> str:
    """Add a record to `row` of `result`, except for its words; returns its text, empty for a bad record."""
    try:
        raw = records[index]
    except DataError as error:
        result.problems[index] = [str(error.args[0])]
        return ""
    checked = quick_check(raw) if check is None else None
    if isinstance(raw, dict) and not (checked and COMMON_KEYS.issuperset(raw)):
        for key in unused_keys(raw):
            result.add_key(key, 1, index)
    if checked:
        text, result.image[row] = checked
        return text
    problems = list(problems_of(raw))
    if not problems:
        record = parse_record(raw)
        problems = check(record) if check else []
        result.image[row] = bool(record.image)
    if problems:
        result.problems[index] = problems
        return ""
    return "\n".join(turn.text for turn in record.turns)


def count_words(texts: Sequence[str]) -> npt.NDArray[np.int32]:
    """`len(text.split())` of N texts: (N,); vectorized, except for texts that may contain non-ASCII whitespace."""
    parts = [text.encode() + b"\n" for text in texts]
    ends = np.cumsum([len(part) for part in parts])
    classes = b"".join(parts).translate(BYTE_CLASSES)
    values = np.frombuffer(classes, np.uint8)
    word_ends = np.flatnonzero(values[1:] > values[:-1]) + 1
    counts = np.diff(np.searchsorted(word_ends, ends), prepend=0).astype(np.int32)
    if classes.find(1) >= 0:
        for index in np.unique(np.searchsorted(ends, np.flatnonzero(values == 1), "right")):
            counts[index] = len(texts[index].split())
    return counts


def image_errors(folder: Path, *, decode: bool) -> RecordCheck:
    """Check for missing and, with `decode`, damaged or oversized image files; each file is checked once."""
    from llava.images import open_image

    def problem(image: ImageFile) -> str | None:
        if not decode:
            exists = isinstance(image, bytes) or (folder / image).is_file()
            return None if exists else f"image {image!r} is not in {folder}"
        try:
            open_image(image if isinstance(image, bytes) else folder / image)
        except DataError as error:
            return str(error.args[0]).rstrip(".")
        return None

    cached = functools.cache(problem)

    def check(record: Record) -> list[str]:
        found = [problem(image) if isinstance(image, bytes) else cached(image) for image in record.image]
        return [text for text in found if text]

    return check


def default_workers() -> int:
    """Number of processes to start: the cores per rank of this node, at most 16."""
    return max(1, min(16, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)))


def _environment() -> dict[str, str]:
    """Environment of the processes, in which this package can be imported without being installed."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _clean_up(owner: int, running: list[subprocess.Popen[bytes]], root: Path) -> None:
    """Kill running processes and remove their files, in the process `owner` only: data loader workers hold copies."""
    if os.getpid() == owner:
        for process in running:
            process.kill()
            process.wait()
        shutil.rmtree(root, ignore_errors=True)


class DatasetScan:
    """Scan of a whole file, running in the background; small files are scanned by the constructor.

    Images below `images` are checked for existence if given, and decoded if `decode`.
    """

    def __init__(
        self, records: Records, *, images: Path | None = None, decode: bool = False, workers: int | None = None
    ):
        self.records = records
        self._result: ScanResult | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        if workers is None and len(records) <= (INLINE_RECORDS if images is None else INLINE_IMAGES):
            check = image_errors(images, decode=decode) if images is not None else None
            self._result = scan_records(records, 0, len(records), check)
            return
        count = default_workers() if workers is None else max(1, workers)
        bounds = np.linspace(0, len(records), min(count, len(records)) + 1).astype(int).tolist()
        self._root = root = Path(tempfile.mkdtemp(prefix="llava-dataset-scan-"))
        self._close = weakref.finalize(self, _clean_up, os.getpid(), self._running, root)
        if isinstance(records, JsonRecords):
            np.save(root / "offsets.npy", records.offsets)
        job = {"file": str(records.path), "images": images and str(images), "decode": decode, "bounds": bounds}
        (root / "job.json").write_text(json.dumps(job), encoding="utf-8")
        for part in range(len(bounds) - 1):
            command = [sys.executable, "-m", __name__, str(root), str(part)]
            with (root / f"{part}.log").open("wb") as log:
                self._running.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=_environment())
                )

    def ready(self) -> bool:
        """Whether `result` returns without waiting."""
        return self._result is not None or all(process.poll() is not None for process in self._running)

    def result(self) -> ScanResult:
        """The result for all records. Waits for the processes; raises `DataError` if one failed."""
        if self._result is None:
            parts = [self._read_part(part, process) for part, process in enumerate(self._running)]
            self._result = ScanResult(
                np.concatenate([part.words for part in parts]),
                np.concatenate([part.image for part in parts]),
                {index: problems for part in parts for index, problems in part.problems.items()},
            )
            for part in parts:
                for key, (count, first) in part.keys.items():
                    self._result.add_key(key, count, first)
            self._close()
        return self._result

    def _read_part(self, part: int, process: subprocess.Popen[bytes]) -> ScanResult:
        if process.wait():
            log = (self._root / f"{part}.log").read_text(errors="replace").strip().splitlines()
            raise DataError(
                f"The scan of {self.records.path} ended with status {process.returncode}: "
                f"{log[-1] if log else 'killed'}; check the free memory."
            )
        arrays = np.load(self._root / f"{part}.npz")
        problems, keys = json.loads(str(arrays["text"]))
        return ScanResult(arrays["words"], arrays["image"], {int(k): v for k, v in problems.items()}, keys)

    def __getstate__(self) -> dict[str, object]:
        """State for another process: the result, or an empty one if the scan is still running."""
        count = len(self.records)
        result = self._result or ScanResult(np.zeros(count, np.int32), np.zeros(count, np.bool_))
        return {"records": self.records, "_result": result, "_running": []}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Scan one part of the job in a directory of `DatasetScan`; the arguments are the directory and the part."""
    root, part = sys.argv[1:] if argv is None else argv
    job = json.loads(Path(root, "job.json").read_text(encoding="utf-8"))
    offsets = Path(root, "offsets.npy")
    records = JsonRecords(Path(job["file"]), np.load(offsets, "r")) if offsets.is_file() else read_records(job["file"])
    check = image_errors(Path(job["images"]), decode=job["decode"]) if job["images"] is not None else None
    start, stop = job["bounds"][int(part) : int(part) + 2]
    result = scan_records(records, start, stop, check)
    text = json.dumps([result.problems, result.keys])
    np.savez(Path(root, f"{part}.npz"), words=result.words, image=result.image, text=np.array(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
