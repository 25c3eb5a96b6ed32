"""Find every bad record of an annotation file before training does: `llava check data.json --images DIR`.

Needs no GPU and no model. Each fault is printed as `file:index: what is wrong`; with `--images` every image is opened
as training opens it. `--write-clean` keeps the good records, byte for byte where the file is JSON. A mixture (what
training takes as `--meta_path`) is checked set by set. The exit status is 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.data.annotations import SUFFIXES, JsonRecords, Records, read_records
from llava.data.dataset_scan import DatasetScan, Findings
from llava.errors import DataError
from llava.files import atomic_write, write_errors
from llava.utils import guarded, require

SHOWN = 1000


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava check", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help=f"annotations or a mixture, {', '.join(SUFFIXES)}")
    parser.add_argument("--images", type=Path, metavar="DIR", help="open the images, whose paths start at DIR")
    parser.add_argument("--no-decode", action="store_true", help="only see that image files exist")
    parser.add_argument("--write-clean", type=Path, metavar="FILE", help="write the good records, in FILE's format")
    parser.add_argument("--workers", type=int, help="processes to use (default: the cores, up to 16)")
    parser.add_argument("--all", action="store_true", help=f"print every fault, not the first {SHOWN}")
    return parser


def sets_of(file: Path, images: Path | None) -> list[tuple[Path, Path | None]]:
    """The annotation files behind `file`, each with the folder of its images: itself, or the sets of a mixture."""
    if file.suffix == ".json" and _is_mixture(file):
        from llava.data.mixture import read_mixture  # imports torch

        return [(Path(entry.annotation), Path(entry.root)) for entry in read_mixture(file)]
    return [(file, images)]


def _is_mixture(file: Path) -> bool:
    """Whether it holds an object, and not one that is a record."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"{") and b'"conversations"' not in head


def report(file: Path, found: Findings, seconds: float, *, shown: int | None) -> str:
    """One line a fault, then counts."""
    faults = [f"{file}:{index}: {text}" for index, texts in sorted(found.problems.items()) for text in texts]
    total, bad = len(found.words), len(found.problems)
    images = int(found.image.sum()) - sum(bool(found.image[index]) for index in found.problems)
    lines = faults[:shown]
    if len(faults) > len(lines):
        lines.append(f"… and {len(faults) - len(lines)} more (--all prints them)")
    kinds = Counter(_kind(text) for texts in found.problems.values() for text in texts)
    lines += [f"  {count:>8} x {kind}" for kind, count in kinds.most_common()]
    good = f"{images} with images and {total - bad - images} without" if total > bad else "none"
    lines.append(f"{file}: {total} records in {seconds:.1f} s: {bad} bad; good are {good}.")
    return "\n".join(lines)


def _kind(text: str) -> str:
    """A fault without what is particular to its record: names of files, quoted text and numbers."""
    text = re.sub(r"(?<=^Cannot read image ).+?(?=: (it|the|there|its|\[\w+) )|'.*'|\".*\"", "…", text)
    words = ["…" if any(char in word for char in "'\"/\\0123456789") else word for word in text.split()]
    return " ".join(words)[:80]


def write_clean(records: Records, bad: Iterable[int], path: Path) -> int:
    """Write the records that are not `bad` to a new file of `path`'s format, whole or not at all; their number."""
    dropped = set(bad)
    good = [index for index in range(len(records)) if index not in dropped]
    if not good:
        raise DataError(f"{records.path} holds no good record, so there is nothing to write to {path}.")
    with atomic_write(path) as part:
        if path.suffix == ".parquet":
            _write_parquet(records, good, part)
        else:
            _write_json(records, good, part, lines=path.suffix == ".jsonl")
    return len(good)


def _write_json(records: Records, good: Sequence[int], part: Path, *, lines: bool) -> None:
    with part.open("wb") as file:
        file.write(b"" if lines else b"[\n")
        for place, index in enumerate(good):
            last = place == len(good) - 1
            file.write(_text(records, index, one_line=lines) + (b"\n" if lines or last else b",\n"))
        file.write(b"" if lines else b"]\n")


def _text(records: Records, index: int, *, one_line: bool) -> bytes:
    raw = records.raw(index).strip() if isinstance(records, JsonRecords) else None
    if raw is None or (one_line and b"\n" in raw):
        return json.dumps(records[index], ensure_ascii=False).encode("utf-8")
    return raw


def _write_parquet(records: Records, good: Sequence[int], part: Path) -> None:
    arrow, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    try:
        parquet.write_table(arrow.Table.from_pylist([dict(records[index]) for index in good]), part)
    except arrow.ArrowException as error:
        raise DataError(f"These records do not fit one Parquet table ({error}); write a .jsonl file.") from error


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    sets = sets_of(args.file, args.images)
    if args.write_clean and len(sets) > 1:
        raise DataError("--write-clean takes one annotation file, not a mixture; clean its sets one by one.")
    if args.write_clean and args.write_clean.suffix not in SUFFIXES:
        raise DataError(f"--write-clean names {args.write_clean}; use a name ending in {', '.join(SUFFIXES)}.")
    if args.images is not None and not args.images.is_dir():
        raise DataError(f"--images names {args.images}, which is not a folder.")
    faulty = False
    for file, folder in sets:
        begin = time.perf_counter()
        records = read_records(file)
        dataset_scan = DatasetScan(records, images=folder, decode=not args.no_decode, workers=args.workers)
        found = dataset_scan.result()
        print(report(file, found, time.perf_counter() - begin, shown=None if args.all else SHOWN))  # noqa: T201
        faulty |= bool(found.problems)
        if args.write_clean:
            with write_errors(args.write_clean):
                kept = write_clean(records, found.problems, args.write_clean)
            print(f"{args.write_clean}: {kept} good records.")  # noqa: T201
    return int(faulty)


if __name__ == "__main__":
    sys.exit(main())
