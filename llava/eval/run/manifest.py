"""Manifests of answers files: model, settings, versions and data behind the answers, compared before a resume."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.eval.run.answers import lock_file
from llava.eval.run.files import Row
from llava.eval.run.questions import Question
from llava.utils import writing

PACKAGES = ("llava", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "pillow")
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
    """sha256 of ids, texts, image names and rounds, in order."""
    rows = [[*question.key, question.text, question.images] for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions, hardware and code commit of this process."""
    import torch  # here, so that merging and scoring need none

    gpus = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "commit": code_commit(),
        "gpu": ", ".join(sorted(gpus)) or None,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def code_commit() -> str | None:
    """The commit of the source tree this package runs from, None when it is installed without one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def write_manifest(answers: Path, identity: Mapping[str, object], **facts: object) -> None:
    """Write the manifest of a run: its identity, `facts` about it, and the environment."""
    save_manifest(answers, {"identity": to_json(identity), **facts, "environment": environment()})


def save_manifest(answers: Path, content: Mapping[str, object]) -> None:
    """Write a manifest's content whole: the file is the old one or the new one."""
    path = manifest_path(answers)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2, default=_jsonable) + "\n", encoding="utf-8")
        temporary.replace(path)


def read_manifest(answers: Path) -> Row | None:
    """The manifest of an answers file, None if it has none."""
    path = manifest_path(answers)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["identity"]["chunk"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the manifest of an answers file; remove it and use --resume.") from error
    return dict(content)


def to_json(identity: Mapping[str, object]) -> Row:
    """An identity as `read_manifest` returns it."""
    return dict(json.loads(json.dumps(identity, default=_jsonable)))


def check_resume(answers: Path, identity: Mapping[str, object], *, resume: bool, overwrite: bool) -> None:
    """Remove `answers` on `overwrite`; otherwise refuse to continue answers made with other settings.

    Raises `ConfigError` naming the first setting that differs, or if the settings of the file are unknown.
    """
    manifest = manifest_path(answers)
    if overwrite:
        if answers.is_file():
            lock_file(answers).close()  # raises if another process is writing the file
        answers.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
    if not answers.is_file():
        return
    content = read_manifest(answers)
    if content is None:
        if resume or not answers.stat().st_size:
            return
        raise ConfigError(
            f"{answers} exists without {manifest.name}, so its settings are unknown; use --overwrite to start over or "
            "--resume to continue it."
        )
    before, now = content["identity"], to_json(identity)
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{answers} was made with {key} {_shorten(before.get(key))}, this run has {_shorten(now[key])}; use "
            "another answers file, or --overwrite."
        )


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _jsonable(value: object) -> object:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
