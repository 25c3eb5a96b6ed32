"""Answers in parts: `N_K.jsonl` is part K of N. Parts of earlier runs are reused, whole sets are merged exactly once.

A run with another number of parts takes over every answer that was made with the same settings; nothing is asked twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from llava.errors import DataError
from llava.eval.run.answers import Row, failure, key_of, written_rows
from llava.eval.run.files import write_jsonl
from llava.eval.run.manifest import read_manifest, save_manifest
from llava.eval.run.questions import Question, chunk_range

SHARD: Final = re.compile(r"\d+_\d+\.jsonl")
WHOLE: Final = "merge.jsonl"  # of a folder of parts

Identity = dict[str, Any]


def shards_folder(answers: Path) -> Path:
    """Where the parts of `NAME.jsonl` are: `NAME.shards`."""
    return answers.with_suffix(".shards")


def shard_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"{count}_{index}.jsonl"


def related_files(answers: Path) -> Iterator[Path]:
    """Files that may hold answers to questions of `answers`: parts, and the whole."""
    is_part = SHARD.fullmatch(answers.name) is not None
    folder = answers.parent if is_part else shards_folder(answers)
    candidates = [path for path in sorted(folder.glob("*.jsonl")) if SHARD.fullmatch(path.name)]
    if is_part:
        candidates += [folder / WHOLE, folder.with_suffix(".jsonl")]
    return (path for path in candidates if path != answers and path.is_file())


def earlier_rows(answers: Path, identity: Identity, questions: Sequence[Question]) -> dict[int, Row]:
    """Answered rows of related files with the same identity, by position in the chunk that `identity` names."""
    index, count = identity["chunk"]
    mine = chunk_range(len(questions), count, index)
    found: dict[int, Row] = {}
    for path in related_files(answers):
        manifest = read_manifest(path)
        if manifest is None or _without_chunk(manifest["identity"]) != _without_chunk(identity):
            continue
        other, others = manifest["identity"]["chunk"]
        for position, row in zip(chunk_range(len(questions), others, other), written_rows(path)):
            if position in mine and failure(row) is None and key_of(row) == questions[position].key:
                found[position - mine.start] = row
    return found


def _without_chunk(identity: Identity) -> Identity:
    return {key: value for key, value in identity.items() if key != "chunk"}


def keys_digest(keys: Iterable[tuple[Any, str, int | None]]) -> str:
    """sha256 over the keys of questions or rows, in order."""
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()


def read_shard(path: Path, index: int, count: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows and manifest of a finished part; `DataError` naming the part when it is not exactly what was asked."""
    name = f"Shard {index} of {count} ({path})"
    again = "run the same command again, it goes on there."
    manifest = read_manifest(path) if path.is_file() else None
    if manifest is None:
        raise DataError(f"{name} is missing; {again}")
    rows = written_rows(path)
    failed = [row for row in rows if failure(row) is not None]
    if manifest["identity"]["chunk"] != [index, count]:
        raise DataError(f"{name} was made as part {manifest['identity']['chunk']}; remove it and {again}")
    if len(rows) != manifest["questions"]:
        raise DataError(f"{name} has {len(rows)} of {manifest['questions']} answers ({manifest['status']}); {again}")
    if failed:
        raise DataError(f"{name} has {len(failed)} failed answers, the first to {failed[0]['question_id']!r}; {again}")
    if keys_digest(map(key_of, rows)) != manifest["keys"]:
        raise DataError(f"{name} does not answer its own questions, each once and in order; remove it and {again}")
    return rows, manifest


def merge(paths: Sequence[Path], target: Path) -> int:
    """Write the rows of all parts to `target`, in question order, and its manifest; how many there are.

    Raises `DataError` naming the part that is missing, unfinished, failed, altered, or of another run.
    """
    parts = [read_shard(path, index, len(paths)) for index, path in enumerate(paths)]
    first = parts[0][1]
    for path, (_, manifest) in zip(paths, parts):
        if _without_chunk(manifest["identity"]) != _without_chunk(first["identity"]):
            raise DataError(f"{path} was made with other settings than {paths[0]}; not merged.")
    rows = [row for found, _ in parts for row in found]
    if len(rows) != first["total"]:
        raise DataError(f"The parts hold {len(rows)} answers to {first['total']} questions; not merged.")
    content = {
        **first,
        "identity": {**first["identity"], "chunk": [0, 1]},
        "status": "complete",
        "questions": len(rows),
        "keys": keys_digest(map(key_of, rows)),
        "asked": sum(manifest.get("asked", 0) for _, manifest in parts),
        "seconds": max(manifest.get("seconds", 0) for _, manifest in parts),
        "shards": [manifest["environment"] for _, manifest in parts],
    }
    # The manifest goes first: answers without theirs would not be continued.
    save_manifest(target, {**content, "status": "running"})
    write_jsonl(target, rows)
    save_manifest(target, content)
    return len(rows)
