"""Files and directories get the mode of the umask, whichever library writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE

import pytest
import torch

from llava.arguments import parse_arguments
from llava.data import check_records
from llava.engine import SamplingParams, load_engine
from llava.eval.run import runner
from llava.eval.run.questions import read_questions
from llava.files import atomic_write, write_text
from llava.model import apply_delta, consolidate, export, extract_projector, make_delta, merge
from llava.serve.web.chat import Chat
from llava.serve.web.log import ConversationLog
from llava.train.train import run
from tests import tiny
from tests.eval.conftest import question_rows, write_jsonl
from tests.serve.test_web_chat import turn_of
from tests.train import runs

UMASKS = [0o022, 0o002, 0o027]


@pytest.fixture(params=UMASKS, ids=[f"{mask:03o}" for mask in UMASKS])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(root: Path, umask: int) -> set[str]:
    """Assert the mode of everything below `root`; returns the names of the files."""
    wrong, names = {}, set()
    for path in root.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        if S_IMODE(path.stat().st_mode) != expected:
            wrong[path.relative_to(root).as_posix()] = oct(path.stat().st_mode)
        names |= set() if path.is_dir() else {path.name}
    assert wrong == {}
    return names


def test_the_mode_of_an_atomic_write(umask: int, tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "file") as part:
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as libraries that replace the file do
    write_text(tmp_path / "deep" / "text", "x")
    assert check_modes(tmp_path, umask) == {"file", "text"}


def test_training(umask: int, tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    data = runs.make_data(tmp_path_factory.mktemp("data") / "mix", samples=8)
    root = tmp_path_factory.mktemp("work")
    stages: dict[str, tuple[int, dict[str, object]]] = {
        "projector": (1, {}), "full": (2, {"plot_loss": True}), "lora": (2, {"lora_enable": True, "lora_r": 2})
    }  # fmt: skip
    for name, (stage, more) in stages.items():
        flags = runs.flags(
            tiny_dirs, data, root / name, stage, max_steps=2, save_strategy="steps", save_steps=1, **more
        )
        run(*parse_arguments(flags))
    written = check_modes(root, umask)
    assert {"model.safetensors", "adapter_model.safetensors", "mm_projector.safetensors", "mm_projector.bin"} <= written
    assert {"non_lora_trainables.safetensors", "optimizer.pt", "run.json", "log.jsonl", "loss.png"} <= written


def test_conversions(umask: int, tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    root, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("out")
    chat = tiny.make_chat(root / "chat", tiny.make_clip_tower(root / "clip"), mm_vision_select_layer=-2)
    lora = tiny.make_lora(root / "lora", chat, tiny_dirs["base"])
    merge.merge(lora, None, out / "merged")
    export.export(chat, out / "exported")
    consolidate.consolidate_ckpt(chat, out / "consolidated", dtype=torch.float32)
    make_delta.make_delta(tiny_dirs["base"], chat, out / "delta", dtype=torch.float32)
    apply_delta.apply_delta(tiny_dirs["base"], out / "applied", out / "delta")
    extract_projector.extract(chat, out / "projector")
    written = check_modes(out, umask)
    assert {"model.safetensors", "mm_projector.safetensors", "config.json", "tokenizer.model"} <= written


def test_answers_and_logs(umask: int, tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    rows = [row for row in question_rows(10) if "image" not in row]
    questions = read_questions(write_jsonl(tmp_path / "questions.jsonl", rows))
    settings = runner.RunSettings(str(tiny_dirs["chat"]), "tiny", "v1", SamplingParams(2), tmp_path)
    out = tmp_path / "out"
    runner.run(load_engine(tiny_dirs["chat"], device="cpu"), questions, out / "a.jsonl", settings)
    log = ConversationLog(out / "logs", chats=True)
    chat = Chat([turn_of("question", "answer", model="m")])
    log.chat(chat, chat.turns[-1], 1.0, "10.0.0.1")
    data = runs.make_data(tmp_path / "data", samples=2)
    argv = [str(data / "finetune.json"), "--images", str(data / "images"), "--workers", "1"]
    assert check_records.main([*argv, "--write-clean", str(out / "clean.json")]) == 0
    assert {"a.jsonl", "clean.json"} < check_modes(out, umask)
