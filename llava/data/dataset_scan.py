"""A look at every record of an annotation file, by processes of their own: faults, words, and which have images.

Training starts while it is under way and is told of faults as soon as they are known; `llava check` waits for it. The
processes (`python -m llava.data.dataset_scan`) import nothing heavy, hold no lock of the parent process, and map the same
file.
"""

from __future__ import annotations

import argparse
import itertools
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
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llava.data.annotations import JsonRecords, Records, read_records
from llava.data.records import Record, glance, parse_record, problems_of
from llava.errors import DataError
from llava.utils import guarded

AT_ONCE: Final = 20_000  # so many records are looked at in a second, without processes,
IMAGES_AT_ONCE: Final = 500  # and so many images
BLOCK: Final = 256  # records whose words are counted together
# of a byte of UTF-8: 0 of a word, 2 a blank, 1 the first of what may be one, as U+00A0, U+2009 and U+3000 are
KINDS: Final = bytes(2 if chr(b).isspace() and b < 128 else int(b in (0xC2, 0xE1, 0xE2, 0xE3)) for b in range(256))
Look = Callable[[Record], list[str]]


@dataclass
class Findings:
    """What a range of records holds: `words` (N,) int32 and `image` (N,) bool, zero and false for a bad record."""

    words: npt.NDArray[np.int32]
    image: npt.NDArray[np.bool_]
    problems: dict[int, list[str]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)


def examine(records: Records, start: int, stop: int, look: Look | None = None) -> Findings:
    """Findings of the records [start, stop); `look` adds problems of a valid record, such as those of its images."""
    found = Findings(np.zeros(stop - start, np.int32), np.zeros(stop - start, np.bool_))
    for block in range(start, stop, BLOCK):
        texts = _examine_block(records, block, min(block + BLOCK, stop), look, found, start)
        found.words[block - start : block - start + len(texts)] = count_words(texts)
    return found


def _examine_block(records: Records, begin: int, end: int, look: Look | None, found: Findings, start: int) -> list[str]:
    """Notes in `found`, which begins at `start`, what these records hold; returns their texts, empty for bad ones."""
    texts = []
    for index in range(begin, end):
        texts.append("")
        try:
            raw = records[index]
        except DataError as error:
            found.problems[index] = [str(error.args[0])]
            continue
        if isinstance(raw, dict):
            found.keys.update(raw)
        seen = glance(raw) if look is None else None
        if seen:
            texts[-1], found.image[index - start] = seen
            continue
        problems = problems_of(raw)
        if not problems:
            record = parse_record(raw)
            problems = look(record) if look else []
            texts[-1] = "\n".join(turn.text for turn in record.turns)
            found.image[index - start] = bool(record.image)
        if problems:
            found.problems[index] = problems
    return texts


def count_words(texts: Sequence[str]) -> npt.NDArray[np.int32]:
    """`len(text.split())` of each: `(N,)`; many at once, one by one where there may be blanks beyond ASCII."""
    parts = [text.encode() + b"\n" for text in texts]
    ends = np.cumsum([len(part) for part in parts])
    kinds = b"".join(parts).translate(KINDS)
    kind = np.frombuffer(kinds, np.uint8)
    words = np.flatnonzero(kind[1:] > kind[:-1]) + 1  # where one has just ended
    counts = np.diff(np.searchsorted(words, ends), prepend=0).astype(np.int32)
    if kinds.find(1) >= 0:
        for index in np.unique(np.searchsorted(ends, np.flatnonzero(kind == 1), "right")):
            counts[index] = len(texts[index].split())
    return counts


def image_errors(folder: Path, *, decode: bool) -> Look:
    """A `look` that finds missing, and with `decode` damaged or oversized, image files; each file is opened once."""
    from llava.images import open_image

    seen: dict[str, str | None] = {}

    def problem(path: str) -> str | None:
        if not decode:
            return None if (folder / path).is_file() else f"image {path!r} is not in {folder}"
        try:
            open_image(folder / path)
        except DataError as error:
            return str(error.args[0]).rstrip(".")
        return None

    def look(record: Record) -> list[str]:
        for path in record.image:
            if path not in seen:
                seen[path] = problem(path)
        return [text for path in record.image if (text := seen[path])]

    return look


def processes() -> int:
    """How many to start: this rank's share of the cores of its node."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)))


def _environment() -> dict[str, str]:
    """This process's, with the package first on the path even when it is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _clear(owner: int, running: list[subprocess.Popen[bytes]], root: Path) -> None:
    """End what still runs and remove its files; nothing in a copy that a loader's worker has."""
    if os.getpid() == owner:
        for process in running:
            process.kill()
            process.wait()
        shutil.rmtree(root, ignore_errors=True)


class DatasetScan:
    """The examination of a whole file, started when made; small files are looked at on the spot.

    `images` is the folder of the images if they shall be looked for, and, with `decode`, opened.
    """

    def __init__(
        self, records: Records, *, images: Path | None = None, decode: bool = False, workers: int | None = None
    ):
        self.records = records
        self._found: Findings | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        if workers is None and len(records) <= (AT_ONCE if images is None else IMAGES_AT_ONCE):
            look = image_errors(images, decode=decode) if images is not None else None
            self._found = examine(records, 0, len(records), look)
            return
        count = processes() if workers is None else max(1, workers)
        self._root = root = Path(tempfile.mkdtemp(prefix="llava-dataset_scan-"))
        self._close = weakref.finalize(self, _clear, os.getpid(), self._running, root)
        if isinstance(records, JsonRecords):
            np.save(root / "places.npy", records.places)
        bounds = np.linspace(0, len(records), min(count, len(records)) + 1).astype(int).tolist()
        for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
            more = ["--images", str(images)] if images is not None else []
            more += ["--decode"] if decode else []
            command = [sys.executable, "-m", __name__, str(records.path), str(root), str(part), str(start), str(stop)]
            with (root / f"{part}.log").open("wb") as log:
                self._running.append(
                    subprocess.Popen([*command, *more], stdin=subprocess.DEVNULL, stderr=log, env=_environment())
                )

    def ready(self) -> bool:
        """Whether `result` would answer at once."""
        return self._found is not None or all(process.poll() is not None for process in self._running)

    def result(self) -> Findings:
        """The findings of all records; waits for the processes."""
        if self._found is None:
            parts = [self._part(self._root, part, process) for part, process in enumerate(self._running)]
            self._found = Findings(
                np.concatenate([part.words for part in parts]),
                np.concatenate([part.image for part in parts]),
                {index: problems for part in parts for index, problems in part.problems.items()},
                {key for part in parts for key in part.keys},
            )
            self._close()
        return self._found

    def _part(self, root: Path, part: int, process: subprocess.Popen[bytes]) -> Findings:
        if process.wait():
            said = (root / f"{part}.log").read_text(errors="replace").strip().splitlines()
            raise DataError(
                f"Looking through {self.records.path} ended with status {process.returncode}: "
                f"{said[-1] if said else 'killed'}; is there memory enough?"
            )
        arrays = np.load(root / f"{part}.npz")
        text = json.loads((root / f"{part}.json").read_text(encoding="utf-8"))
        problems = {int(index): list(problems) for index, problems in text["problems"].items()}
        return Findings(arrays["words"], arrays["image"], problems, set(text["keys"]))

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process has the findings, if they are known, and never waits."""
        known = self._found or Findings(np.zeros(len(self.records), np.int32), np.zeros(len(self.records), np.bool_))
        return {"records": self.records, "_found": known, "_running": []}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """One process of a dataset_scan."""
    parser = argparse.ArgumentParser(prog="python -m llava.data.dataset_scan", description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part")
    parser.add_argument("start", type=int)
    parser.add_argument("stop", type=int)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args(argv)
    places = args.folder / "places.npy"
    records = JsonRecords(args.file, np.load(places, "r")) if places.is_file() else read_records(args.file)
    look = image_errors(args.images, decode=args.decode) if args.images is not None else None
    found = examine(records, args.start, args.stop, look)
    np.savez(args.folder / f"{args.part}.npz", words=found.words, image=found.image)
    text = json.dumps({"problems": found.problems, "keys": sorted(found.keys)})
    (args.folder / f"{args.part}.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
