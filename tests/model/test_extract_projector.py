"""Extract the projector from every layout written by training, and load it onto a base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava import cli
from llava.errors import CheckpointError
from llava.model import extract_projector
from llava.model.checkpoint import Kind, inspect
from tests import tiny
from tests.model.test_builder import edit_config, load, logits

PROJECTOR = {f"model.mm_projector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}


def as_bin(chat: Path) -> None:
    torch.save(load_file(chat / "model.safetensors"), chat / "pytorch_model.bin")
    (chat / "model.safetensors").unlink()


def as_shards(chat: Path) -> None:
    model = load(chat)
    (chat / "model.safetensors").unlink()
    model.save_pretrained(chat, max_shard_size="100KB")
    assert len(list(chat.glob("model-*.safetensors"))) > 1


def as_sharded_bin(chat: Path) -> None:
    model = load(chat)
    (chat / "model.safetensors").unlink()
    model.save_pretrained(chat, max_shard_size="100KB", safe_serialization=False)
    assert len(list(chat.glob("pytorch_model-*.bin"))) > 1


@pytest.mark.parametrize("layout", [lambda chat: None, as_bin, as_shards, as_sharded_bin])
def test_from_every_layout_of_a_full_checkpoint(tiny_dirs: dict[str, Path], tmp_path: Path, layout: Any) -> None:
    """With the language model of the checkpoint as base, the extracted projector has the logits of the checkpoint."""
    chat = shutil.copytree(tiny_dirs["chat"], tmp_path / "chat")
    layout(chat)
    out = tmp_path / "out"
    assert cli.main(["extract-projector", "--model-path", str(chat), "--output", str(out)]) == 0
    assert inspect(out).kind is Kind.PROJECTOR
    assert json.loads((out / "config.json").read_text()) == json.loads((chat / "config.json").read_text())
    assert set(torch.load(out / "mm_projector.bin", weights_only=True)) == PROJECTOR
    assert torch.equal(logits(load(out, chat)), logits(load(tiny_dirs["chat"])))


def test_from_a_lora_run(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.make_lora(tmp_path / "run", tiny_dirs["chat"], tiny_dirs["base"])
    assert set(extract_projector.extract(run, tmp_path / "out")) == PROJECTOR
    state = load_file(tiny_dirs["chat"] / "model.safetensors")
    made = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(made[name], state[name]) for name in PROJECTOR)


def test_token_rows_and_tuned_positions_go_with_it(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    flags = {"mm_use_im_start_end": True, "tune_vit_pos_embedding": True, "vocab_size": 386}
    chat = tiny.make_chat(tmp_path / "chat", tiny_dirs["tower"], embed_tower=True, **flags)
    names = set(extract_projector.extract(chat, tmp_path / "out")) - PROJECTOR
    table = "model.vision_tower.vision_tower.embeddings.position_embedding"
    assert names == {"model.embed_tokens.weight", table}
    made = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert made["model.embed_tokens.weight"].shape == (386, 48)
    assert torch.equal(load(tmp_path / "out", tiny_dirs["base"]).state_dict()[table], made[table])


def test_a_directory_without_a_projector_is_refused(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(CheckpointError, match="a text-only language model; --model-path must be a full checkpoint"):
        extract_projector.extract(tiny_dirs["base"], tmp_path / "out")
    chat = shutil.copytree(tiny_dirs["chat"], tmp_path / "chat")
    edit_config(chat, mm_projector_type="linear")
    with pytest.raises(CheckpointError, match="does not fit the configured projector"):
        extract_projector.extract(chat, tmp_path / "out")
    edit_config(chat, mm_hidden_size=None)
    with pytest.raises(CheckpointError, match="configuration of .* is invalid"):
        extract_projector.extract(chat, tmp_path / "out")
    monkeypatch.setattr(extract_projector.ckpt, "read_tensors", lambda file: {})
    with pytest.raises(CheckpointError, match="projector written differs from that of"):
        extract_projector.extract(tiny_dirs["chat"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat"]
