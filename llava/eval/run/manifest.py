"""Manifests of answers files: model, settings, versions and data behind the answers, compared before a resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import ConfigError, DataError
from llava.eval.run.files import Row
from llava.eval.run.questions import Question
from llava.files import lock_file, write_text
from llava.provenance import file_digest, git_commit, installed_versions

if TYPE_CHECKING:
    from llava.eval.benchmarks.base import Task


def manifest_path(answers: Path) -> Path:
    return answers.with_name(answers.name + ".manifest.json")


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """sha256 of ids, texts, image names and rounds, in order."""
    rows = [[*question.key, question.text, question.images] for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def environment() -> Row:
    """Versions, hardware and code commit of this process."""
    import torch  # lazily: merging and scoring do not need it

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


def scorer_record(task: Task, answers: Path) -> Row:
    """Record of what determines a score: version and code of the scorer of `task`, hashes of labels and answers.

    Labels are named by their paths in the benchmark's folder.
    """
    names = {each.__module__ for each in type(task).__mro__ if each.__module__.startswith("llava.")}
    names |= {"llava.eval.benchmarks.parsing", "llava.eval.run.answers"}
    code = b"".join(Path(str(sys.modules[name].__file__)).read_bytes() for name in sorted(names))
    return {
        "version": installed_versions(["llava"]).get("llava"),
        "code": hashlib.sha256(code).hexdigest(),
        "labels": {path.relative_to(task.root).as_posix(): file_digest(path) for path in task.label_files()},
        "answers": file_digest(answers),
    }


def write_manifest(answers: Path, identity: Mapping[str, object], **facts: object) -> None:
    """Write the manifest of a run: its identity, `facts` about it, and the environment."""
    save_manifest(answers, {"identity": to_json(identity), **facts, "environment": environment()})


def save_manifest(answers: Path, content: Mapping[str, object]) -> None:
    """Write the manifest of an answers file."""
    write_text(manifest_path(answers), json.dumps(content, indent=2, default=_jsonable) + "\n")


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
    dropped = {"prompt_profile"} & before.keys() - now.keys()
    differing = [key for key in (*now, *dropped) if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{answers} was made with {key} {_shorten(before.get(key))}, this run has {_shorten(now.get(key))}; use "
            "another answers file, or --overwrite."
        )


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _jsonable(value: object) -> object:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
