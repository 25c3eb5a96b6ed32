"""Validate the records of an annotation file: `llava check data.json --images DIR`.

Each problem is printed as `file:index: problem`. With `--images`, images are decoded as in training. `--write-clean`
copies the valid records, byte for byte from a JSON file. A mixture (a file for `--meta_path`) is validated dataset by
dataset. Keys that are not used are named. Neither a GPU nor a model is needed. The exit status is 1 if there are
problems.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from llava.data.annotations import SUFFIXES, JsonRecords, Records, read_records
from llava.data.dataset_scan import DatasetScan, ScanResult
from llava.data.mixture import read_mixture
from llava.errors import DataError
from llava.files import atomic_write, write_errors
from llava.utils import guarded, require

MAX_PRINTED = 1000
CONTROL = re.compile(rb"<\\?/?s>|<(?:unk|pad|bos|eos|im_start|im_end|im_patch|eoh|eoa)>|<\|[^|<>\s]{1,40}\|>")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava check", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help=f"annotations or a mixture, {', '.join(SUFFIXES)}")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, which are decoded")
    parser.add_argument("--no-decode", action="store_true", help="check only that image files exist")
    parser.add_argument("--write-clean", type=Path, metavar="FILE", help="copy the valid records, in FILE's format")
    parser.add_argument("--workers", type=int, help="number of processes (default: number of cores, at most 16)")
    parser.add_argument("--all", action="store_true", help=f"print all problems, not the first {MAX_PRINTED}")
    return parser


def read_datasets(file: Path, images: Path | None) -> list[tuple[Path, Path | None]]:
    """Annotation files and image folders: those of a mixture, or `file` and `images` themselves."""
    if file.suffix.lower() == ".json" and _is_mixture(file):
        return [(Path(entry.annotation), Path(entry.root)) for entry in read_mixture(file)]
    return [(file, images)]


def _is_mixture(file: Path) -> bool:
    """Whether the file holds an object that is not a record."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"{") and not (b'"conversations"' in head or b'"messages"' in head)


def report(file: Path, result: ScanResult, seconds: float, *, limit: int | None) -> str:
    """The first `limit` problems, the number of each kind, and a summary, one per line."""
    problems = [f"{file}:{index}: {text}" for index, texts in sorted(result.problems.items()) for text in texts]
    total, bad = len(result.words), len(result.problems)
    images = int(result.image.sum()) - sum(bool(result.image[index]) for index in result.problems)
    lines = problems[:limit]
    if len(problems) > len(lines):
        lines.append(f"… and {len(problems) - len(lines)} more (--all prints them)")
    kinds = Counter(_kind(text) for texts in result.problems.values() for text in texts)
    lines += [f"  {count:>8} x {kind}" for kind, count in kinds.most_common()]
    lines += [f"  {text}" for text in result.unused_keys()]
    good = f"{images} with images and {total - bad - images} without" if total > bad else "none"
    lines.append(f"{file}: {total} records in {seconds:.1f} s: {bad} bad; good are {good}.")
    return "\n".join(lines)


def _kind(text: str) -> str:
    """A problem without file names, quoted text and numbers of the record."""
    text = re.sub(r"(?<=^Cannot read image ).+?(?=: (it|its|no|the|\[\w+) )|'.*'|\".*\"", "…", text)
    words = ["…" if any(char in word for char in "'\"/\\0123456789") else word for word in text.split()]
    return " ".join(words)[:80]


def control_strings(records: Records, bad: Container[int]) -> str | None:
    """A note on the good records with strings that tokenizers make control tokens, in training also in messages."""
    found: dict[int, bytes] = {}
    for index in range(len(records)):
        if index in bad:
            continue
        if isinstance(records, JsonRecords):
            text = records.raw(index)
        else:
            record = cast(Mapping[str, object], records[index])
            text = str([record.get(key) for key in ("conversations", "messages")]).encode(errors="replace")
        if match := CONTROL.search(text):
            found[index] = match[0].replace(b"\\", b"")
    if not found:
        return None
    first = next(iter(found))
    return (
        f"note: record {first} of {records.path} contains {found[first].decode()!r}; training encodes such strings as "
        f"control tokens where the tokenizer has them, as published ({len(found)} record(s))"
    )


def write_clean(records: Records, bad: Iterable[int], path: Path) -> int:
    """Write the records that are not `bad` in the format of `path`'s suffix, atomically; returns their number."""
    dropped = set(bad)
    good = [index for index in range(len(records)) if index not in dropped]
    if not good:
        raise DataError(f"{records.path} holds no valid record to write to {path}.")
    with atomic_write(path) as part:
        if path.suffix.lower() == ".parquet":
            _write_parquet(records, good, part)
        else:
            _write_json(records, good, part, lines=path.suffix.lower() == ".jsonl")
    return len(good)


def _write_json(records: Records, good: Sequence[int], part: Path, *, lines: bool) -> None:
    with part.open("wb") as file:
        file.write(b"" if lines else b"[\n")
        for index in good:
            end = b"\n" if lines or index == good[-1] else b",\n"
            file.write(_text(records, index, one_line=lines) + end)
        file.write(b"" if lines else b"]\n")


def _text(records: Records, index: int, *, one_line: bool) -> bytes:
    raw = records.raw(index).strip() if isinstance(records, JsonRecords) else None
    if raw is not None and not (one_line and b"\n" in raw):
        return raw
    try:
        return json.dumps(records[index], ensure_ascii=False).encode("utf-8")
    except TypeError as error:
        raise DataError("The records hold images, which JSON cannot; write a .parquet file.") from error


def _write_parquet(records: Records, good: Sequence[int], part: Path) -> None:
    arrow, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    try:
        parquet.write_table(arrow.Table.from_pylist([records[index] for index in good]), part)
    except arrow.ArrowException as error:
        raise DataError(f"The records do not fit one Parquet schema ({error}); write a .jsonl file.") from error


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    datasets = read_datasets(args.file, args.images)
    if args.write_clean and len(datasets) > 1:
        raise DataError("--write-clean needs an annotation file, got a mixture; clean its datasets separately.")
    if args.write_clean and args.write_clean.suffix.lower() not in SUFFIXES:
        raise DataError(f"--write-clean must name a file ending in {', '.join(SUFFIXES)}, got {args.write_clean}.")
    if args.images is not None and not args.images.is_dir():
        raise DataError(f"--images must be a folder, got {args.images}.")
    any_bad = False
    for file, folder in datasets:
        begin = time.perf_counter()
        records = read_records(file)
        result = DatasetScan(records, images=folder, decode=not args.no_decode, workers=args.workers).result()
        if note := control_strings(records, result.problems):
            print(note)  # noqa: T201
        print(report(file, result, time.perf_counter() - begin, limit=None if args.all else MAX_PRINTED))  # noqa: T201
        any_bad |= bool(result.problems)
        if args.write_clean:
            with write_errors(args.write_clean):
                count = write_clean(records, result.problems, args.write_clean)
            print(f"{args.write_clean}: {count} good records.")  # noqa: T201
    return int(any_bad)


if __name__ == "__main__":
    sys.exit(main())
