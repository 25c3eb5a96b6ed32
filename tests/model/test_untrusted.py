"""Untrusted checkpoints: pickles are refused in every file, their code is not run, and offline mode opens no socket."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import CheckpointError
from llava.model.apply_delta import apply_delta
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.consolidate import consolidate_ckpt
from llava.model.extract_projector import extract
from llava.model.make_delta import make_delta
from llava.model.merge import merge
from tests.model import zoo
from tests.test_package import ROOT


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("exploded", "w"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> zoo.Shelf:
    return zoo.shelf(tmp_path_factory.mktemp("shelf"))


def in_tower(**how: Any) -> zoo.Make:
    """A chat model with a separate tower in `.bin` format."""

    def make(shelf: zoo.Shelf, directory: Path) -> None:
        shelf.copy("chat", directory)
        tower = shelf.copy("tower", directory / "its-tower")
        zoo.put(tower, zoo.take_weights(tower), bin_files=True, **how)
        zoo.edit(directory, mm_vision_tower=str(tower))

    return make


def over_base(shelf: zoo.Shelf, directory: Path) -> None:
    """A projector and its base in `.bin` format."""
    zoo.projector()(shelf, directory)
    base = shelf.copy("base", directory / "its-base")
    zoo.put(base, zoo.take_weights(base), bin_files=True)


POSITIONS: dict[str, tuple[zoo.Make, str, str | None]] = {
    "the model's file": (zoo.full(bin_files=True), "pytorch_model.bin", None),
    "the model's first shard": (zoo.full(bin_files=True, shards=2), "pytorch_model-00001-of-00002.bin", None),
    "the model's last shard": (zoo.full(bin_files=True, shards=2), "pytorch_model-00002-of-00002.bin", None),
    "the projector's file": (zoo.projector(), "mm_projector.bin", "base"),
    "tuned positions": (zoo.projector(positions=True), "mm_projector.bin", "base"),
    "the adapter's file": (zoo.adapter(bin_file=True), "adapter_model.bin", None),
    "beside the adapter": (zoo.adapter(), "non_lora_trainables.bin", None),
    "the tower's file": (in_tower(), "its-tower/pytorch_model.bin", None),
    "the tower's shard": (in_tower(shards=2), "its-tower/pytorch_model-00002-of-00002.bin", None),
    "the base's file": (over_base, "its-base/pytorch_model.bin", "its-base"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_pickle_is_refused(
    shelf: zoo.Shelf, tmp_path: Path, position: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, file, base = POSITIONS[position]
    directory = tmp_path / "it"
    make(shelf, directory)
    names = list(torch.load(directory / file, weights_only=True))
    state = {**dict.fromkeys(names[1:], torch.zeros(1)), names[0]: Bomb()}
    if zipped:
        torch.save(state, directory / file)
    else:
        (directory / file).write_bytes(pickle.dumps(state, protocol=2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model_base = directory / base if base == "its-base" else getattr(shelf, base) if base else None
    attempts: list[Callable[[], Any]] = [
        lambda: load_pretrained_model(directory, model_base, device="cpu"),
        lambda: examine(directory, model_base),
    ]
    if base is None and "tower" not in file:
        out = tmp_path / "out"
        tools: dict[str, Callable[[], Any]] = {
            "pytorch_model": lambda: consolidate_ckpt(directory, out, dtype=torch.float32),
            "adapter_model": lambda: merge(directory, None, out),
            "non_lora": lambda: extract(directory, out),
        }
        attempts += [tool for start, tool in tools.items() if file.startswith(start)]
    if file == "pytorch_model.bin":
        attempts += [
            lambda: make_delta(shelf.base, directory, tmp_path / "delta", dtype=torch.float32),
            lambda: apply_delta(shelf.base, tmp_path / "target", directory),
            lambda: extract(directory, tmp_path / "projector"),
        ]
    for attempt in attempts:
        with pytest.raises(CheckpointError, match=r"would run code\) and is refused"):
            attempt()
    assert list((tmp_path / "here").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "it"]


def test_code_beside_the_weights_is_not_run(shelf: zoo.Shelf, tmp_path: Path) -> None:
    chat = shelf.copy("chat", tmp_path / "chat")
    tower = shelf.copy("tower", tmp_path / "its-tower")
    for directory in (chat, tower):
        for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
            (directory / f"{name}.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
        zoo.edit(directory, auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"})
    path = chat / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}}
    path.write_text(json.dumps(settings))
    zoo.edit(chat, mm_vision_tower=str(tower))
    load_pretrained_model(chat, device="cpu")


OFFLINE = """
import sys
import urllib3  # as it is imported it tries, with a socket of its own, whether there is IPv6
opened = []
sys.addaudithook(lambda event, args: opened.append((event, args)) if event.startswith("socket.") else None)
from llava.cli import main
from llava.model.builder import load_pretrained_model
model = load_pretrained_model("someone/chat", device="cpu")[1]
assert model.get_vision_tower().name == "someone/tower"
assert main(["check", sys.argv[1]]) == 0
assert not opened, opened
import socket
socket.socket().close()
assert opened, "the guard of this test does not see sockets"
print("no socket")
"""


def in_cache(cache: Path, name: str, directory: Path) -> Path:
    """Put a directory into a Hugging Face cache, like a download."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123")
    return Path(shutil.copytree(directory, place / "snapshots" / "abc123"))


def test_offline_opens_no_socket(shelf: zoo.Shelf, tmp_path: Path) -> None:
    """Load model and tower by hub name from the cache, in a process that records every socket."""
    cache = tmp_path / "hub"
    in_cache(cache, "someone/tower", shelf.tower)
    chat = in_cache(cache, "someone/chat", shelf.chat)
    zoo.edit(chat, mm_vision_tower="someone/tower")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, str(chat)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "no socket"
