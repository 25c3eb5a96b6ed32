"""Loading: the files decide, errors name their remedy, and a tower inside the checkpoint takes precedence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError, ConfigError
from llava.model import builder
from llava.model import checkpoint as ckpt
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import Kind, inspect, iter_tensors
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from tests import tiny

PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
IDS = torch.tensor([[1, 5, -200, 9, 11]])
TOWER_PREFIX = "model.vision_tower.vision_tower."


def load(path: Path, base: Path | None = None, **kwargs: Any) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(path, base, path.name, device="cpu", **kwargs)[1]


def logits(model: LlavaLlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(IDS, images=PIXELS).logits
    return output


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def chat(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dirs["chat"], tmp_path / "chat")


@pytest.fixture
def projector(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A projector-only checkpoint whose projector is that of the tiny chat model."""
    directory = tmp_path / "projector-only"
    directory.mkdir()
    shutil.copy(tiny_dirs["chat"] / "config.json", directory)
    state = load_file(tiny_dirs["chat"] / "model.safetensors")
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, directory / "mm_projector.bin")
    return directory


# --- what a directory is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "checkpoint-500", "my-lora", "mpt-x", "llava-v1.5"])
def test_the_folder_name_decides_nothing(tiny_dirs: dict[str, Path], tmp_path: Path, name: str) -> None:
    renamed = shutil.copytree(tiny_dirs["chat"], tmp_path / name)
    model = load(renamed)
    assert type(model) is LlavaLlamaForCausalLM
    assert torch.equal(logits(model), logits(load(tiny_dirs["chat"])))


@pytest.mark.parametrize("model_type", ["llava", "llama", "llava_llama"])
def test_old_model_types(chat: Path, tiny_dirs: dict[str, Path], model_type: str) -> None:
    edit_config(chat, model_type=model_type, architectures=["LlamaForCausalLM"])
    assert torch.equal(logits(load(chat)), logits(load(tiny_dirs["chat"])))


def test_bin_and_sharded_weights(chat: Path, tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(load(tiny_dirs["chat"]))
    state = load_file(chat / "model.safetensors")
    (chat / "model.safetensors").unlink()
    torch.save({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, chat / "pytorch_model.bin")
    assert torch.equal(logits(load(chat)), expected)
    sharded = tmp_path / "sharded"
    load(tiny_dirs["chat"]).save_pretrained(sharded, max_shard_size="100KB")
    shutil.copy(tiny_dirs["chat"] / "tokenizer.model", sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(sharded)), expected)
    next(iter(sharded.glob("model-*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match=r"model-0000.*incomplete"):
        load(sharded)


def foreign(config: dict[str, Any] | None, *files: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config))
        for file in files:
            (directory / file).write_bytes(b"not read")

    return make


NATIVE = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (foreign(NATIVE, "model.safetensors"), Kind.HF_LLAVA, "LlavaForConditionalGeneration, or use"),
        (foreign({"model_type": "internvl_chat"}, "model.safetensors"), Kind.INTERNVL_CHAT, "InternVL repository"),
        (foreign({"model_type": "llama"}, "model.safetensors"), Kind.LANGUAGE_MODEL, "does not take images"),
        (foreign({"model_type": "intern_vit_6b"}, "model.safetensors"), Kind.TOWER, "--vision-tower"),
        (foreign({"model_type": "mistral"}, "model.safetensors"), Kind.OTHER, "mm_vision_tower"),
        (foreign(None), Kind.EMPTY, "config.json and"),
        (foreign({"model_type": "llava_llama", "mm_vision_tower": "x"}), Kind.EMPTY, "mm_projector.bin"),
        (foreign({"mm_vision_tower": "x"}, "adapter_config.json"), Kind.LORA, "adapter_config.json cannot be read"),
    ],
)
def test_other_kinds_are_refused_unread(tmp_path: Path, make: Callable[[Path], None], kind: Kind, message: str) -> None:
    make(tmp_path)
    assert inspect(tmp_path).kind is kind
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_missing_directories_and_files(tmp_path: Path, chat: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"someone/unknown.*offline mode"):
        load_pretrained_model("someone/unknown", device="cpu")
    (chat / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load(chat)
    with pytest.raises(CheckpointError, match="no directory"):
        inspect(tmp_path / "nowhere")


def test_what_may_not_be_read_is_named(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(chat, mm_vision_tower=f"/{'x' * 300}/tower")  # fails as a path below someone else's directory does
    with pytest.raises(CheckpointError, match=r"was not found; tried /xxx.*offline mode"):
        load(chat)
    with pytest.raises(CheckpointError, match="There is no directory"):
        load(chat.parent / ("x" * 300) / "chat")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("No such file or directory")  # what safetensors says of a file without permission

    monkeypatch.setattr(ckpt, "safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors \(No such"):
        load(chat)
    monkeypatch.setattr(ckpt.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="permission denied"):
        load(chat)


@pytest.mark.parametrize("content", [b"", b"\x00\x01damaged", b"{}", b"[1]"])
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_tokenizer_is_named(chat: Path, file: str, content: bytes) -> None:
    for old in chat.glob("tokenizer*"):
        old.unlink()
    (chat / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"The tokenizer of .* cannot be loaded"):
        load(chat)


def test_a_projector_needs_its_base(projector: Path, tiny_dirs: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="--model-base lmsys/vicuna-7b-v1.5"):
        load(projector)
    with pytest.raises(CheckpointError, match=r"--model-base .* a vision tower"):
        load(projector, tiny_dirs["tower"])
    model = load(projector, tiny_dirs["base"])
    stored = torch.load(projector / "mm_projector.bin", weights_only=True)
    for name, value in stored.items():
        assert torch.equal(model.state_dict()[name], value)
    edit_config(projector, hidden_size=64)
    with pytest.raises(CheckpointError, match="hidden_size=64.*hidden_size=48"):
        load(projector, tiny_dirs["base"])


def test_a_projector_that_does_not_fit_names_both_sides(projector: Path, tiny_dirs: dict[str, Path]) -> None:
    edit_config(projector, mm_projector_type="linear")
    with pytest.raises(CheckpointError, match=r"the file has 0\.bias 48.*requires bias 48, weight 48x32"):
        load(projector, tiny_dirs["base"])
    torch.save({"lm_head.weight": torch.zeros(2)}, projector / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="no 'mm_projector.' weights"):
        load(projector, tiny_dirs["base"])


def test_a_projector_with_added_tokens(projector: Path, tiny_dirs: dict[str, Path]) -> None:
    """The base has fewer embeddings than the checkpoint's config; new rows are appended to those of the base."""
    edit_config(projector, mm_use_im_start_end=True, mm_use_im_patch_token=True, vocab_size=387)
    with pytest.raises(CheckpointError, match="without --mm_use_im_start_end"):
        load(projector, tiny_dirs["base"])
    state = torch.load(projector / "mm_projector.bin", weights_only=True)
    torch.save({**state, "model.embed_tokens.weight": torch.full((2, 48), 7.0)}, projector / "mm_projector.bin")
    tokenizer, model, _, _ = load_pretrained_model(projector, tiny_dirs["base"], device="cpu")
    assert len(tokenizer) == 387
    assert model.get_input_embeddings().weight.shape[0] == 387
    assert (model.get_input_embeddings().weight[-2:] == 7).all()


# --- weights are verified ------------------------------------------------------------------------------------------


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[name]

    return change


def test_missing_unexpected_and_misshapen_weights_are_errors(chat: Path) -> None:
    def damage(state: dict[str, torch.Tensor]) -> None:
        state["model.surprise"] = state.pop("model.norm.weight")
        state["lm_head.weight"] = torch.zeros(3, 3)

    rewrite(chat, damage)
    with pytest.raises(
        CheckpointError,
        match=r"missing \(.*model.norm.weight.*unexpected \(model.surprise\).*lm_head.weight is \(3, 3\)",
    ):
        load(chat)
    (chat / "model.safetensors").write_bytes(b"\x10damaged")
    with pytest.raises(CheckpointError, match="cannot be read|damaged"):
        load(chat)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("exploded", "w"))


def test_code_in_weights_is_refused(
    projector: Path, chat: Path, tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (projector / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.0.weight": Bomb()}, protocol=2))
    with pytest.raises(CheckpointError, match="would run code"):
        load(projector, tiny_dirs["base"])
    torch.save({"model.mm_projector.0.weight": Bomb()}, projector / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="would run code"):
        load(projector, tiny_dirs["base"])
    (chat / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, chat / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="would run code"):
        load(chat)
    assert not (tmp_path / "exploded").exists()
    torch.save([1, 2], projector / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="dictionary of tensors"):
        load(projector, tiny_dirs["base"])
    (projector / "mm_projector.bin").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(projector, tiny_dirs["base"])


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="counts resident pages as Linux does")
def test_what_was_read_and_not_kept_leaves_memory(tmp_path: Path) -> None:
    """A 4-bit load keeps the norms and packs the matrices: the file must not stay mapped through the norms."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    layers = {f"layers.{i:02}.matrix": torch.full((2**21,), float(i)) for i in range(16)}  # 8 MiB each
    norms = {f"layers.{i:02}.norm": torch.ones(64) for i in range(16)}
    save_file({**layers, **norms}, tmp_path / "model.safetensors")
    del layers
    before, peak, kept = resident(), 0, []
    for name, tensor in iter_tensors(tmp_path, lambda name: True):
        assert tensor is not None
        if name.endswith("norm"):
            kept.append(tensor)
        else:
            tensor.sum()
        peak = max(peak, resident() - before)
    assert len(kept) == 16
    assert peak < 48 * 2**20  # of 128


# --- the tower -----------------------------------------------------------------------------------------------------


def test_the_tower_in_the_checkpoint_wins(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    chat = tiny.make_chat(tmp_path / "chat", tiny_dirs["tower"], embed_tower=True)
    key = TOWER_PREFIX + "encoder.layers.1.mlp.fc1.weight"

    def perturb(state: dict[str, torch.Tensor]) -> None:
        state[key] += 1.0

    rewrite(chat, perturb)
    tower = load(chat).get_vision_tower()
    assert tower is not None
    stock = load_file(tiny_dirs["tower"] / "model.safetensors")["encoder.layers.1.mlp.fc1.weight"]
    torch.testing.assert_close(tower.vision_tower.encoder.layers[1].mlp.fc1.weight, stock + 1.0)
    overridden = load(chat, vision_tower=str(tiny_dirs["tower"])).get_vision_tower()
    assert overridden is not None
    assert torch.equal(overridden.vision_tower.encoder.layers[1].mlp.fc1.weight, stock)


def test_a_complete_checkpoint_needs_no_tower_directory(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    tower = shutil.copytree(tiny_dirs["tower"], tmp_path / "tower")
    chat = tiny.make_chat(tmp_path / "chat", tower, embed_tower=True)
    expected = logits(load(chat))
    edit_config(chat, mm_vision_tower_config=json.loads((tower / "config.json").read_text()))
    shutil.rmtree(tower)
    assert torch.equal(logits(load(chat)), expected)


def test_a_table_of_another_resolution(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """577 rows in the checkpoint, 257 in the stock tower: the grid comes from the table (IV#86)."""
    chat = tiny.make_chat(tmp_path / "chat", tiny_dirs["tower"], embed_tower=True)
    table = torch.randn(1, 577, 32)
    rewrite(chat, lambda state: state.update({TOWER_PREFIX + "embeddings.position_embedding": table}))
    tower = load(chat).get_vision_tower()
    assert tower is not None
    assert torch.equal(tower.vision_tower.embeddings.position_embedding, table)
    for size, tokens in ((224, 256), (336, 576), (448, 1024)):
        features = tower(torch.zeros(1, 3, size, size))
        assert features.shape == (1, tokens, 32)
        assert features.isfinite().all()


def test_the_tower_is_searched_in_order(tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    chat = shutil.copytree(tiny_dirs["chat"], tmp_path / "models" / "chat")
    edit_config(chat, mm_vision_tower="/training/host/towers/my-tower")
    with pytest.raises(CheckpointError) as error:
        load(chat)
    for place in ("/training/host/towers/my-tower", str(chat / "my-tower"), str(tmp_path / "models" / "my-tower"),
                  "the Hugging Face cache", "offline mode", "--vision-tower"):  # fmt: skip
        assert place in str(error.value)
    shutil.copytree(tiny_dirs["tower"], tmp_path / "models" / "my-tower")
    beside = load(chat).get_vision_tower()
    assert beside is not None
    assert beside.directory == tmp_path / "models" / "my-tower"
    monkeypatch.setenv("LLAVA_VISION_TOWER", str(tiny_dirs["tower"]))
    assert load(chat).get_vision_tower().directory == tiny_dirs["tower"]  # type: ignore[union-attr]


def test_tower_faults(tiny_dirs: dict[str, Path], tmp_path: Path, chat: Path) -> None:
    tower = shutil.copytree(tiny_dirs["tower"], tmp_path / "EVA-448")
    edit_config(chat, mm_vision_tower=str(tower))
    assert torch.equal(logits(load(chat)), logits(load(tiny_dirs["chat"])))
    rewrite(tower, drop("encoder.layers.0.ls1"))
    with pytest.raises(CheckpointError, match=r"missing \(encoder.layers.0.ls1\)"):
        load(chat)
    rewrite(tower, drop("embeddings.position_embedding"))
    with pytest.raises(CheckpointError, match="does not hold the tower"):
        load(chat)
    edit_config(tower, model_type="siglip")
    with pytest.raises(CheckpointError, match=r"'siglip'.*intern_vit_6b"):
        load(chat)
    edit_config(chat, mm_vision_tower=str(tiny_dirs["tower"]), mm_vision_select_layer=-9)
    with pytest.raises(ConfigError, match="select_layer=-9"):
        load(chat)
    edit_config(chat, mm_vision_select_layer=-4, mm_vision_select_feature="cls")
    with pytest.raises(ConfigError, match="patch, cls_patch"):
        load(chat)


def test_a_tower_that_does_not_fit_is_refused_unread(
    tiny_dirs: dict[str, Path], tmp_path: Path, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    wide = tiny.make_tower(tmp_path / "wide", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"features of width 64, but the mlp2x_gelu projector of .* takes 32"):
        load_pretrained_model(chat, device="cpu", vision_tower=str(wide))
    for size in (13, 10**6):
        edit_config(chat, mm_vision_image_size=size)
        with pytest.raises(CheckpointError, match=f"images of {size} to"):
            load(chat)
    for kind in ("mlp100x_gelu", "two_mlp"):
        edit_config(chat, mm_vision_image_size=56, mm_projector_type=kind)
        with pytest.raises((CheckpointError, ConfigError), match=f"Unknown .*{kind}|the {kind} projector"):
            load(chat)


def test_no_socket_is_opened(tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    load(tiny_dirs["chat"])


# --- placement -----------------------------------------------------------------------------------------------------


def test_one_dtype_for_all_parts(tiny_dirs: dict[str, Path]) -> None:
    model = load(tiny_dirs["chat"], dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(IDS, images=PIXELS).logits.isfinite().all()
    assert model.model.layers[0].self_attn.rotary_emb.cos_cached.dtype is torch.bfloat16


def test_context_length_and_extra_base(chat: Path, tiny_dirs: dict[str, Path], caplog: Any) -> None:
    edit_config(chat, max_sequence_length=777)
    assert load_pretrained_model(chat, tiny_dirs["base"], device_map="cpu")[3] == 777
    assert "is ignored" in caplog.text
    with pytest.raises(ConfigError, match="mutually exclusive"):
        load(chat, load_4bit=True, load_8bit=True)
    (chat / "tokenizer.model").unlink()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (chat / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(chat)
