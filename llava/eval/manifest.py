"""The manifest beside an answers file: what produced it, exactly enough to be diffed and to refuse a wrong resume."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava.errors import ConfigError
from llava.eval.questions import Question

PACKAGES = ("llava", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "pillow")
_CHECKPOINT_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer", "special_tokens")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json")


def manifest_path(answers: Path) -> Path:
    return answers.with_name(answers.name + ".manifest.json")


def checkpoint_fingerprint(path: str | Path) -> str:
    """sha256 over names and sizes of a checkpoint's files and its config's content; a hub name stands for itself."""
    directory = Path(path)
    if not directory.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and (file.name.startswith(_CHECKPOINT_FILES) or file.name.endswith(_WEIGHT_SUFFIXES)):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    config = directory / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    return digest.hexdigest()


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """sha256 over ids, texts and picture names, in order."""
    rows = [[question.question_id, question.prompt, question.text, question.images] for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions, hardware and code commit of this process."""
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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


def write_manifest(answers: Path, identity: dict[str, Any], **facts: Any) -> None:
    """Write (atomically) what identifies the answers, and facts about this run."""
    path = manifest_path(answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    content = {"identity": identity, **facts, "environment": environment()}
    temporary.write_text(json.dumps(content, indent=2, default=_plain) + "\n", encoding="utf-8")
    temporary.replace(path)


def check_resume(answers: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Prepare `answers` for a run: remove it on `overwrite`, refuse to continue answers of other settings.

    Raises `ConfigError` naming the first setting that differs, or asking what to do with a file of unknown origin.
    """
    manifest = manifest_path(answers)
    if overwrite:
        answers.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
    if not answers.is_file():
        return
    if not manifest.is_file():
        if resume:
            return
        raise ConfigError(
            f"{answers} exists without {manifest.name}, so its settings are unknown; use --overwrite to start "
            "afresh or --resume to continue it."
        )
    before = json.loads(manifest.read_text(encoding="utf-8"))["identity"]
    now = json.loads(json.dumps(identity, default=_plain))
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{answers} was made with {key} {_short(before.get(key))}, this run has {_short(now[key])}; use another "
            "answers file, or --overwrite."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
