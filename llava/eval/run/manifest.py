"""The manifest beside an answers file: what produced it, exactly enough to be diffed and to refuse a wrong resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.eval.run.answers import lock
from llava.eval.run.questions import Question
from llava.files import write_text
from llava.provenance import git_commit, installed_versions

_CHECKPOINT_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer", "special_tokens")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json")
_SAMPLES, _SAMPLE = 32, 1 << 16  # of a weight file: reading 26 GB for a hash would take longer than many a benchmark


def manifest_path(answers: Path) -> Path:
    return answers.with_name(answers.name + ".manifest.json")


def checkpoint_fingerprint(path: str | Path) -> str:
    """sha256 over a checkpoint's configuration, and names, sizes and samples (32 of 64 KiB) of its other files.

    A hub name stands for itself.
    """
    directory = Path(path)
    if not directory.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and (file.name.startswith(_CHECKPOINT_FILES) or file.name.endswith(_WEIGHT_SUFFIXES)):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for sample in _samples(file):
                digest.update(sample)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """All of a small file; of a large one evenly spread parts, the first and the last among them."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= _SAMPLES * _SAMPLE:
            yield handle.read()
            return
        for index in range(_SAMPLES):
            handle.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
            yield handle.read(_SAMPLE)


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """sha256 over ids, texts, picture names and rounds, in order."""
    rows = [[*question.key, question.text, question.images] for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions, hardware and code commit of this process."""
    import torch  # here, so that merging and scoring need none

    gpus = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    versions = installed_versions()
    return {
        "python": versions.pop("python"),
        "packages": versions,
        "commit": git_commit(),
        "gpu": ", ".join(sorted(gpus)) or None,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def write_manifest(answers: Path, identity: dict[str, Any], **facts: Any) -> None:
    """Write (atomically) what identifies the answers, and facts about this run."""
    save_manifest(answers, {"identity": plain(identity), **facts, "environment": environment()})


def save_manifest(answers: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest's content whole: the file is the old one or the new one."""
    write_text(manifest_path(answers), json.dumps(content, indent=2, default=_plain) + "\n")


def read_manifest(answers: Path) -> dict[str, Any] | None:
    """The manifest of an answers file, None when there is none."""
    path = manifest_path(answers)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["identity"]["chunk"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no manifest of answers; remove it and use --resume.") from error
    return dict(content)


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it comes back from a file."""
    return dict(json.loads(json.dumps(identity, default=_plain)))


def check_resume(answers: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Prepare `answers` for a run: remove it on `overwrite`, refuse to continue answers of other settings.

    Raises `ConfigError` naming the first setting that differs, or asking what to do with a file of unknown origin.
    """
    manifest = manifest_path(answers)
    if overwrite:
        if answers.is_file():
            lock(answers).close()  # refuses to take it from a process that is writing it
        answers.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
    if not answers.is_file():
        return
    content = read_manifest(answers)
    if content is None:
        if resume or not answers.stat().st_size:
            return
        raise ConfigError(
            f"{answers} exists without {manifest.name}, so its settings are unknown; use --overwrite to start "
            "afresh or --resume to continue it."
        )
    before, now = content["identity"], plain(identity)
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{answers} was made with {key} {_short(before.get(key))}, this run has {_short(now[key])}; use another "
            "answers file, or --overwrite."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
