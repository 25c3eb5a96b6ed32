"""Which weight files of a directory count: one answer for chat, check, training, merge, conversion."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.arguments import parse_arguments
from llava.errors import CheckpointError
from llava.model import checkpoint as ckpt
from llava.model import consolidate, extract_projector, merge
from llava.model.check import examine
from llava.model.saving import WeightSource, write_tensors
from llava.train.model_setup import load_base
from tests import tiny
from tests.model import zoo
from tests.model.test_builder import edit_config, load, logits
from tests.train import runs

KEY = "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
State = dict[str, Tensor]


def train_base(directory: Path, **flags: Any) -> State:
    """The weights that training on `directory` starts from."""
    tower = json.loads((directory / "config.json").read_text()).get("mm_vision_tower")
    dirs = {"base": directory, "tower": Path(tower or "none")}
    model_args, _, args = parse_arguments(runs.flags(dirs, directory, directory / "unused", 2, **flags))
    state: State = load_base(model_args, args).state_dict()
    return {name: value.clone() for name, value in state.items()}


def chat_weights(directory: Path) -> State:
    state: State = load(directory).state_dict()
    return {name: value for name, value in state.items() if "vision_tower" not in name}


def stored_weights(directory: Path) -> State:
    source = WeightSource(directory)
    return {name: source.read(name) for name in source.shapes}


def consolidated(directory: Path) -> State:
    with tempfile.TemporaryDirectory() as out:
        consolidate.consolidate_ckpt(directory, out, dtype=torch.float32)
        return {name: value.clone() for name, value in load_file(f"{out}/model.safetensors").items()}


READERS: dict[str, Callable[[Path], State]] = {
    "chat": chat_weights, "training": train_base, "stored": stored_weights, "consolidate": consolidated
}  # fmt: skip


def all_read(directory: Path, expected: State) -> None:
    examine(directory)
    for reader, read in READERS.items():
        found = read(directory)
        assert found.keys() == expected.keys(), reader
        assert all(torch.equal(found[name], value) for name, value in expected.items()), reader


def all_refuse(directory: Path) -> str:
    sentences = set()
    for read in (*READERS.values(), examine):
        with pytest.raises(CheckpointError) as said:
            read(directory)
        sentences.add(str(said.value))
    assert len(sentences) == 1, sentences
    return sentences.pop()


@pytest.fixture
def chat(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dirs["chat"], tmp_path / "chat")


@pytest.fixture
def weights(chat: Path) -> State:
    return {name: value.clone() for name, value in load_file(chat / "model.safetensors").items()}  # not mapped


def other(weights: State) -> State:
    """As after further training: the same names and shapes."""
    return {name: value + 0.01 if name == KEY else value for name, value in weights.items()}


# --- several sets of weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_single_file_beside_an_index_of_missing_shards(chat: Path, weights: State, left: int) -> None:
    """Saved in three shards, later as one file, of which some are gone."""
    zoo.put(chat, weights, shards=3)
    for number in range(left, 3):
        (chat / f"model-0000{number + 1}-of-00003.safetensors").unlink()
    all_read(chat, weights)


def test_a_single_file_beside_equal_shards(chat: Path, weights: State) -> None:
    zoo.put(chat, weights, shards=3)
    zoo.put(chat, weights, shards=2, bin_files=True)
    all_read(chat, weights)


@pytest.mark.parametrize("bin_files", [False, True])
@pytest.mark.parametrize("left", [2, 3])
def test_a_single_file_beside_other_shards(chat: Path, weights: State, left: int, bin_files: bool) -> None:
    zoo.put(chat, other(weights), shards=3, bin_files=bin_files)
    stem, suffix = ("pytorch_model", "bin") if bin_files else ("model", "safetensors")
    shards = [chat / f"{stem}-0000{number}-of-00003.{suffix}" for number in (1, 2, 3)]
    of_key = json.loads((chat / f"{stem}.{suffix}.index.json").read_text())["weight_map"][KEY]
    for shard in [shard for shard in shards if shard.name != of_key][: 3 - left]:
        shard.unlink()
    sentence = all_refuse(chat)
    assert f"two sets of weights that differ in {KEY}: model.safetensors and {stem}.{suffix}.index.json" in sentence
    (chat / "model.safetensors").unlink()
    if left == 3:
        all_read(chat, other(weights))
    else:
        assert "incomplete" in all_refuse(chat)


def test_a_bin_file_of_another_save(chat: Path, weights: State) -> None:
    """Trained on in a copy of a hub directory, and saved without safetensors."""
    torch.save(other(weights), chat / "pytorch_model.bin")
    assert f"differ in {KEY}: model.safetensors and pytorch_model.bin" in all_refuse(chat)
    (chat / "model.safetensors").unlink()
    all_read(chat, other(weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_weights_in_another_precision(chat: Path, weights: State, dtype: torch.dtype) -> None:
    rounded = {name: value.to(dtype).float() for name, value in weights.items()}
    save_file(rounded, chat / "model.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    torch.save({**{name: value.to(dtype) for name, value in rounded.items()}, **table}, chat / "pytorch_model.bin")
    all_read(chat, rounded)


@pytest.mark.parametrize("content", ["", POINTER])
def test_what_was_not_downloaded_does_not_count(chat: Path, weights: State, content: str) -> None:
    zoo.put(chat, weights, shards=2, bin_files=True)
    (chat / "pytorch_model-00002-of-00002.bin").write_text(content)
    all_read(chat, weights)
    torch.save(weights, chat / "pytorch_model.bin")
    (chat / "model.safetensors").write_text(content)
    all_read(chat, weights)
    (chat / "pytorch_model.bin").write_text(content)
    assert ("Git LFS pointer" if content else "it is empty") in all_refuse(chat)


def test_an_index_of_deleted_shards_beside_a_bin_file(chat: Path, weights: State) -> None:
    zoo.put(chat, zoo.take_weights(chat), shards=2)
    for shard in chat.glob("model-*.safetensors"):
        shard.unlink()
    torch.save(weights, chat / "pytorch_model.bin")
    all_read(chat, weights)


def test_shards_of_another_count_are_not_listed(chat: Path, weights: State) -> None:
    zoo.put(chat, other(weights), shards=3)
    zoo.put(chat, zoo.take_weights(chat), shards=2)
    all_read(chat, weights)


def test_a_weight_in_two_shards(chat: Path) -> None:
    zoo.put(chat, zoo.take_weights(chat), shards=2)
    second = chat / "model-00002-of-00002.safetensors"
    first = load_file(chat / "model-00001-of-00002.safetensors")
    save_file({**load_file(second), "model.norm.weight": first.get("model.norm.weight", torch.ones(48))}, second)
    save_file({**first, "model.norm.weight": torch.ones(48)}, chat / "model-00001-of-00002.safetensors")
    assert "model.norm.weight is stored twice" in all_refuse(chat)


# --- the weights themselves -------------------------------------------------------------------------------------------


def test_safetensors_without_metadata(chat: Path, weights: State) -> None:
    save_file(weights, chat / "model.safetensors")
    all_read(chat, weights)


def test_integers_are_quantized_weights(chat: Path, weights: State) -> None:
    for integers in (torch.int8, torch.uint8):
        save_file({**weights, KEY: weights[KEY].to(integers)}, chat / "model.safetensors")
        assert f"{KEY} in {chat}/model.safetensors is not floating-point: the weights are quantized" in all_refuse(chat)
    zoo.take_weights(chat)
    torch.save({**weights, KEY: weights[KEY].to(torch.int8)}, chat / "pytorch_model.bin")
    assert "not floating-point" in all_refuse(chat)


def test_a_delta_is_no_base(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Neither for training nor below an adapter."""
    delta = shutil.copytree(tiny_dirs["base"], tmp_path / "delta")
    state = load_file(delta / "model.safetensors")
    save_file({name: value * 1e-3 for name, value in state.items()}, delta / "model.safetensors")
    run = tiny.make_lora(tmp_path / "run", tiny_dirs["chat"], tiny_dirs["base"])
    uses: list[Callable[[], Any]] = [
        lambda: train_base(delta),
        lambda: examine(delta),
        lambda: load(run, delta),
        lambda: merge.merge(run, delta, tmp_path / "out"),
        lambda: load(delta, text_only=True),
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match="are delta weights.*apply_delta"):
            use()


@pytest.mark.parametrize("stage", [1, 2])
def test_training_starts_as_chat_does(tiny_dirs: dict[str, Path], tmp_path: Path, stage: int) -> None:
    """Also generation settings and names, which transformers would have read."""
    base = shutil.copytree(tiny_dirs["base"], tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.4}))
    flags = runs.flags({**tiny_dirs, "base": base}, base, tmp_path / "out", stage)
    model_args, _, args = parse_arguments(flags)
    model = load_base(model_args, args)
    assert model.generation_config.temperature == 0.4
    assert model.config.name_or_path == str(base) and model.config.use_cache is False and not model.training
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    edit_config(base, tie_word_embeddings=True)
    tied = load_file(base / "model.safetensors")
    del tied["lm_head.weight"]
    save_file(tied, base / "model.safetensors", metadata={"format": "pt"})
    model = load_base(model_args, args)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied["model.embed_tokens.weight"])


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saving_over_an_earlier_save_leaves_one_set(chat: Path, weights: State) -> None:
    changed = load(chat)
    with torch.no_grad():
        changed.get_parameter(KEY).add_(1)
    expected = {**weights, KEY: weights[KEY] + 1}
    for size in ("100KB", "5GB", "100KB"):
        changed.save_pretrained(chat, max_shard_size=size)
        names = {file.name for file in chat.glob("model*")}
        assert ("model.safetensors" in names) != ("model.safetensors.index.json" in names)
        found = stored_weights(chat)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- projectors -------------------------------------------------------------------------------------------------------


def projector_users(directory: Path, dirs: dict[str, Path]) -> list[Callable[[], object]]:
    flags = runs.flags(dirs, directory, directory / "unused", 2, pretrain_mm_mlp_adapter=directory / "mm_projector.bin")
    model_args, _, args = parse_arguments(flags)
    return [
        lambda: load(directory, dirs["base"]),
        lambda: examine(directory, dirs["base"]),
        lambda: load_base(model_args, args).get_model().initialize_vision_modules(model_args),
    ]


def test_a_projector_in_two_formats(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    made = tiny.make_projector_only(tmp_path / "projector", tiny_dirs["chat"])
    expected = logits(load(made, tiny_dirs["base"]))
    file = made / "mm_projector.bin"
    state = torch.load(file, weights_only=True)
    write_tensors(file, state)
    safe = made / "mm_projector.safetensors"
    assert all(torch.equal(load_file(safe)[name], value) for name, value in state.items())
    assert torch.equal(logits(load(made, tiny_dirs["base"])), expected)
    file.unlink()
    assert torch.equal(logits(load(made, tiny_dirs["base"])), expected)
    for use in projector_users(made, tiny_dirs):
        use()
    torch.save({name: value + (name.endswith("0.bias")) for name, value in state.items()}, file)
    for use in projector_users(made, tiny_dirs):
        with pytest.raises(CheckpointError, match=r"differ in .*0.bias: mm_projector.safetensors and mm_projector.bin"):
            use()
    file.write_bytes(b"\x80\x02cos\nsystem\n.")  # a pickle of code: never run, and not needed
    assert torch.equal(logits(load(made, tiny_dirs["base"])), expected)


def test_extracted_projectors_have_both_formats(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    extract_projector.extract(tiny_dirs["chat"], tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "mm_projector.bin", "mm_projector.safetensors"}
    assert ckpt.tensor_file(tmp_path / "out" / "mm_projector.bin").name == "mm_projector.safetensors"
