"""Merge the shards of a run that several processes answered, and reuse answers of earlier shards.

    python -m llava.eval.run.shards --answers-dir FOLDER --num-chunks N [--output FILE]

`FOLDER/N_K.jsonl` is shard K of N. Nothing is written if a shard is missing, incomplete or altered. A run with another
number of shards reuses every answer that was made with the same settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from llava.errors import ConfigError, DataError
from llava.eval.program import file_flag, flag, program
from llava.eval.run.answers import read_complete_lines, row_error, row_key
from llava.eval.run.files import Row, write_jsonl
from llava.eval.run.manifest import read_manifest, save_manifest
from llava.eval.run.questions import Question, QuestionKey, chunk_range

SHARD: Final = re.compile(r"\d+_\d+\.jsonl")
MERGED: Final = "merge.jsonl"  # name of the merged file in a folder of shards


def shards_folder(answers: Path) -> Path:
    """The folder of the shards of `NAME.jsonl`: `NAME.shards`."""
    return answers.with_suffix(".shards")


def shard_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"{count}_{index}.jsonl"


def shard_paths(folder: Path, count: int) -> list[Path]:
    return [shard_path(folder, index, count) for index in range(count)]


def related_files(answers: Path) -> Iterator[Path]:
    """Other files that may answer questions of `answers`: shards, and the merged file."""
    is_shard = SHARD.fullmatch(answers.name) is not None
    folder = answers.parent if is_shard else shards_folder(answers)
    candidates = [path for path in sorted(folder.glob("*.jsonl")) if SHARD.fullmatch(path.name)]
    if is_shard:
        candidates += [folder / MERGED, folder.with_suffix(".jsonl")]
    return (path for path in candidates if path != answers and path.is_file())


def earlier_rows(answers: Path, identity: Row, questions: Sequence[Question]) -> dict[int, Row]:
    """Answers in related files with the same identity, by position in the chunk of `identity`."""
    index, count = identity["chunk"]
    chunk = chunk_range(len(questions), count, index)
    found: dict[int, Row] = {}
    for path in related_files(answers):
        manifest = read_manifest(path)
        if manifest is None or _without_chunk(manifest["identity"]) != _without_chunk(identity):
            continue
        other_index, other_count = manifest["identity"]["chunk"]
        positions = chunk_range(len(questions), other_count, other_index)
        for position, row in zip(positions, read_complete_lines(path)):
            if position in chunk and row_error(row) is None and row_key(row) == questions[position].key:
                found[position - chunk.start] = row
    return found


def _without_chunk(identity: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in identity.items() if key != "chunk"}


def keys_digest(keys: Iterable[QuestionKey]) -> str:
    """sha256 of the keys of questions or records, in order."""
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()


def read_shard(path: Path, index: int, count: int) -> tuple[list[Row], Row]:
    """Records and manifest of a complete shard. Raises `DataError` if the shard is incomplete or inconsistent."""
    name = f"Shard {index} of {count} ({path})"
    again = "run the same command again to resume it."
    manifest = read_manifest(path) if path.is_file() else None
    if manifest is None:
        raise DataError(f"{name} is missing; {again}")
    rows = read_complete_lines(path)
    failed = [row for row in rows if row_error(row) is not None]
    if manifest["identity"]["chunk"] != [index, count]:
        raise DataError(f"{name} was written as shard {manifest['identity']['chunk']}; remove it and {again}")
    if len(rows) != manifest["questions"]:
        raise DataError(f"{name} has {len(rows)} of {manifest['questions']} answers ({manifest['status']}); {again}")
    if failed:
        first = failed[0]["question_id"]
        raise DataError(f"{name} has {len(failed)} failed answers, the first to question {first!r}; {again}")
    if keys_digest(map(row_key, rows)) != manifest["keys"]:
        raise DataError(f"{name} must answer each of its questions once and in order; remove it and {again}")
    return rows, manifest


def merge(paths: Sequence[Path], target: Path) -> int:
    """Write the records of all shards to `target` in question order, with a manifest; return their number.

    Raises `DataError` for a shard that is missing, incomplete, failed, altered, or made with other settings.
    """
    shards = [read_shard(path, index, len(paths)) for index, path in enumerate(paths)]
    first = shards[0][1]
    for path, (_, manifest) in zip(paths, shards):
        if _without_chunk(manifest["identity"]) != _without_chunk(first["identity"]):
            raise DataError(f"{path} was made with other settings than {paths[0]}; not merged.")
    rows = [row for shard, _ in shards for row in shard]
    if len(rows) != first["total"]:
        raise DataError(f"The shards have {len(rows)} answers to {first['total']} questions; not merged.")
    content = {
        **first,
        "identity": {**first["identity"], "chunk": [0, 1]},
        "status": "complete",
        "questions": len(rows),
        "keys": keys_digest(map(row_key, rows)),
        "asked": sum(manifest.get("asked", 0) for _, manifest in shards),
        "seconds": max(manifest.get("seconds", 0) for _, manifest in shards),
        "engine": total_statistics([manifest.get("engine") for _, manifest in shards]),
        "shards": [manifest["environment"] for _, manifest in shards],
    }
    # The manifest goes first: an answers file without one would not be resumed.
    save_manifest(target, {**content, "status": "running"})
    write_jsonl(target, rows)
    save_manifest(target, content)
    return len(rows)


def total_statistics(statistics: Sequence[Row | None]) -> Row | None:
    """Sum of the engine statistics of all shards; None if one has none, as with a server or an earlier version."""
    total: Row = {}
    for found in statistics:
        if found is None:
            return None
        for name, value in found.items():
            if isinstance(value, dict):
                total[name] = total_statistics([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def merge_folder(answers_dir: Path, num_chunks: int, output: Path | None) -> str:
    """Merge `FOLDER/N_0.jsonl` … into one file (default: `FOLDER/merge.jsonl`)."""
    if num_chunks < 1:
        raise ConfigError(f"--num-chunks must be at least 1, got {num_chunks}.")
    target = output or answers_dir / MERGED
    count = merge(shard_paths(answers_dir, num_chunks), target)
    return f"{target}: {count} answers from {num_chunks} shard(s)"


_CHUNKS = flag("--num-chunks", type=int, required=True)
main = program(__doc__, merge_folder, file_flag("--answers-dir"), _CHUNKS, file_flag("--output", required=False))

if __name__ == "__main__":
    raise SystemExit(main())
