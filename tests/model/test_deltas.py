"""Delta weights, consolidation, and atomic directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError, ConfigError
from llava.files import atomic_directory
from llava.model import apply_delta, checkpoint, consolidate, hub, make_delta, saving
from llava.model.saving import WeightSource
from llava.placement import parse_dtype
from tests import tiny
from tests.model.test_builder import edit_config, load, logits
from tests.model.test_chat_template import holds_template

Weights = dict[str, torch.Tensor]


def weights(directory: Path) -> Weights:
    source = WeightSource(directory)
    return {name: source.read(name) for name in source.shapes}


@pytest.fixture
def pair(tiny_dirs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A base, and a float16 chat model finetuned from it, with two more rows for image tokens and its tower inside."""
    base = shutil.copytree(tiny_dirs["base"], tmp_path / "base")
    target = tiny.make_chat(tmp_path / "target", tiny_dirs["tower"], embed_tower=True, vocab_size=386)
    state = load_file(target / "model.safetensors")
    for name, value in load_file(base / "model.safetensors").items():
        nudge = 0.02 * torch.randn(value.shape)
        state[name][tuple(slice(0, size) for size in value.shape)] = value + nudge
    half = {name: value.half() for name, value in state.items()}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    edit_config(target, torch_dtype="float16")
    half = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    torch.save({**half, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return {"base": base, "target": target, "delta": tmp_path / "delta", "again": tmp_path / "again"}


def arguments(pair: dict[str, Path], target: str, *more: str) -> list[str]:
    return ["--base-model-path", str(pair["base"]), "--target-model-path", str(pair[target]),
            "--delta-path", str(pair["delta"]), *more]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_make_and_apply(pair: dict[str, Path], capsys: Any, dtype: str) -> None:
    assert make_delta.main(arguments(pair, "target", "--dtype", dtype)) == 0
    base, target, difference = weights(pair["base"]), weights(pair["target"]), weights(pair["delta"])
    assert difference.keys() == target.keys()
    for name, value in difference.items():
        if name not in base:
            assert name.startswith(("model.mm_projector.", "model.vision_tower."))
            assert torch.equal(value, target[name])
            continue
        assert value.dtype is getattr(torch, dtype)
        rows = len(base[name])
        assert torch.equal(value[:rows], (target[name][:rows].float() - base[name].float()).to(value.dtype))
        assert torch.equal(value[rows:], target[name][rows:].to(value.dtype))
    assert apply_delta.main(arguments(pair, "again")) == 0
    restored = weights(pair["again"])
    for name, value in target.items():
        assert restored[name].dtype is torch.float16
        if dtype == "float32":
            assert torch.equal(restored[name], value)
        torch.testing.assert_close(restored[name], value, rtol=2**-10, atol=2**-11 * 0.1)
    assert "float16 and verified" in capsys.readouterr().out
    assert (pair["again"] / "tokenizer.model").read_bytes() == (pair["target"] / "tokenizer.model").read_bytes()
    assert load(pair["again"]).config.conv_template == "v1"
    assert holds_template(pair["delta"], "v1") and holds_template(pair["again"], "v1")


def test_published_signatures(pair: dict[str, Path], old: Path, monkeypatch: Any) -> None:
    """The functions take the arguments of the published ones, by position and by name."""
    pushed: list[tuple[str, str]] = []
    monkeypatch.setattr(make_delta, "push_to_hub", lambda *args: pushed.append(args))
    make_delta.make_delta(str(pair["base"]), str(pair["target"]), str(pair["delta"]), "me/delta")
    assert pushed == [(str(pair["delta"]), "me/delta")]
    make_delta.make_delta(
        base_model_path=pair["base"], target_model_path=pair["target"], delta_path=pair["base"].parent / "named",
        hub_repo_id=None,
    )  # fmt: skip
    apply_delta.apply_delta(str(pair["base"]), str(pair["again"]), str(pair["delta"]))
    apply_delta.apply_delta(
        base_model_path=pair["base"], target_model_path=pair["base"].parent / "again-named", delta_path=pair["delta"]
    )
    assert weights(pair["again"]).keys() == weights(pair["base"].parent / "again-named").keys()
    consolidate.consolidate_ckpt(str(old), str(old.parent / "new"))
    consolidate.consolidate_ckpt(src_path=old, dst_path=old.parent / "new-named")
    assert {value.dtype for value in weights(old.parent / "new-named").values()} == {torch.float16}


def test_a_linear_projector_of_the_first_deltas(pair: dict[str, Path], tiny_dirs: dict[str, Path]) -> None:
    """The first LLaVA deltas have no dtype (float16 applies) and `model.mm_projector.weight`."""
    pair["delta"].mkdir()
    difference = {name: torch.full_like(value, 0.125) for name, value in weights(pair["base"]).items()}
    del difference["model.layers.0.self_attn.rotary_emb.inv_freq"]
    difference["model.mm_projector.weight"] = torch.ones(48, 32)
    save_file(difference, pair["delta"] / "model.safetensors")
    (pair["delta"] / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert apply_delta.main(arguments(pair, "again")) == 0
    restored, base = weights(pair["again"]), weights(pair["base"])
    assert torch.equal(restored["lm_head.weight"], (base["lm_head.weight"].float() + 0.125).half())
    assert torch.equal(restored["model.mm_projector.weight"], torch.ones(48, 32).half())


def test_directories_that_do_not_belong_together(pair: dict[str, Path], tmp_path: Path) -> None:
    def refused(words: str, **changes: torch.Tensor | None) -> None:
        state = load_file(pair["target"] / "model.safetensors")
        state = {k: v for k, v in {**state, **changes}.items() if v is not None}
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        save_file(state, other / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            make_delta.make_delta(pair["base"], other, pair["delta"])
        assert not pair["delta"].exists()

    refused("model.surprise, which is missing from .* not part of a projector", **{"model.surprise": torch.zeros(1)})
    refused(r"model.norm.weight is \(48,\) .* \(49,\)", **{"model.norm.weight": torch.zeros(49)})
    refused(r"lm_head.weight is \(384, 48\) .* \(383, 48\)", **{"lm_head.weight": torch.zeros(383, 48)})
    refused("model.norm.weight of .* is missing from", **{"model.norm.weight": None})
    refused("--dtype float32", **{"model.norm.weight": torch.full((48,), 1e6)})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ConfigError, match="Unknown dtype"):
        parse_dtype("int8")


def test_a_model_in_place_of_a_delta_is_refused(pair: dict[str, Path], capsys: Any) -> None:
    pair["delta"] = pair["target"]
    assert apply_delta.main(arguments(pair, "again")) == 2
    assert "holds a model, not differences from" in capsys.readouterr().err
    pair["delta"] = pair["base"].parent / "nowhere"
    assert make_delta.main(arguments(pair, "delta")) == 2
    assert "There is no directory" in capsys.readouterr().err
    assert not pair["again"].exists() and not pair["delta"].exists()


def test_a_tampered_delta_is_not_kept(pair: dict[str, Path], monkeypatch: Any, capsys: Any) -> None:
    plain = saving.write_weights

    def falsified(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        plain(directory, ((name, value + (name == "model.norm.weight")) for name, value in tensors))

    monkeypatch.setattr(saving, "write_weights", falsified)
    assert make_delta.main(arguments(pair, "target")) == 2
    assert "The delta of model.norm.weight has an error of" in capsys.readouterr().err
    assert not pair["delta"].exists()
    monkeypatch.setattr(saving, "write_weights", plain)
    assert make_delta.main(arguments(pair, "target")) == 0
    monkeypatch.setattr(saving, "write_weights", falsified)
    assert apply_delta.main(arguments(pair, "again")) == 2
    assert "model.norm.weight is not base + delta in torch.float16" in capsys.readouterr().err
    assert not pair["again"].exists()


def test_pushing(pair: dict[str, Path], monkeypatch: Any, capsys: Any) -> None:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, exist_ok: calls.append((name, str(exist_ok))))
    monkeypatch.setattr(
        hub.HfApi, "upload_folder", lambda self, repo_id, folder_path: calls.append((repo_id, folder_path))
    )
    assert make_delta.main(arguments(pair, "target", "--hub-repo-id", "me/delta")) == 0
    assert calls == [("me/delta", "True"), ("me/delta", str(pair["delta"]))]

    def denied(*args: Any, **kwargs: Any) -> None:
        raise HfHubHTTPError("401 Unauthorized")

    monkeypatch.setattr(hub.HfApi, "create_repo", denied)
    with pytest.raises(CheckpointError, match="is written, but cannot be pushed to me/delta: 401"):
        hub.push_to_hub(pair["delta"], "me/delta")


# --- consolidate ---------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """An old checkpoint: `model_type: llava`, a `.bin` with rotary tables, its tower inside."""
    directory = tiny.make_chat(tmp_path / "old", tiny_dirs["tower"], embed_tower=True)
    state = load_file(directory / "model.safetensors")
    torch.save(
        {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, directory / "pytorch_model.bin"
    )
    (directory / "model.safetensors").unlink()
    edit_config(directory, model_type="llava", architectures=["LlamaForCausalLM"])
    return directory


def test_consolidate(old: Path, tmp_path: Path) -> None:
    before = (old / "config.json").read_text()
    assert consolidate.main(["--src", str(old), "--dst", str(tmp_path / "new"), "--yes", "--dtype", "float32"]) == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert config["conv_template"] == "v1" and holds_template(tmp_path / "new", "v1")
    assert (old / "config.json").read_text() == before
    kept = weights(tmp_path / "new")
    assert "model.vision_tower.vision_tower.encoder.layers.5.ls1" in kept
    assert not any("inv_freq" in name for name in kept)
    assert torch.equal(logits(load(tmp_path / "new")), logits(load(old)))
    assert consolidate.main(["--src", str(tmp_path / "new"), "--dst", str(tmp_path / "half")]) == 0  # asks nothing
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("", 1), ("Y", 0), (None, 2)])
def test_the_question(old: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, answer: Any, status: int) -> None:
    def reply(question: str) -> str:
        assert "llava / LlamaForCausalLM; the copy will say llava_llama. Continue? [Y/N]" in question
        if answer is None:
            raise EOFError
        return str(answer)

    monkeypatch.setattr("builtins.input", reply)
    assert consolidate.main(["--src", str(old), "--dst", str(tmp_path / "new")]) == status
    assert (tmp_path / "new").exists() is (status == 0)
    if answer is None:
        assert "pass --yes" in capsys.readouterr().err


def test_consolidate_refuses(old: Path, tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="a vision tower; only whole models"):
        consolidate.consolidate_ckpt(tiny_dirs["tower"], tmp_path / "new")
    state = {name: value.clone() for name, value in checkpoint.load_bin(old / "pytorch_model.bin").items()}
    torch.save({**state, "lm_head.weight": torch.full((384, 48), 1e6)}, old / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values out of the range of torch.float16"):
        consolidate.consolidate_ckpt(old, tmp_path / "new")
    torch.save({**state, "lm_head.weight": torch.zeros(380, 48)}, old / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \(380, 48\)"):
        consolidate.consolidate_ckpt(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- writing -------------------------------------------------------------------------------------------------------


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{k}": torch.full((10,), float(k)) for k in range(7)}
    saving.write_weights(tmp_path, tensors.items(), shard_bytes=100)
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 280}
    assert all(torch.equal(value, tensors[name]) for name, value in weights(tmp_path).items())
    assert checkpoint.weight_shapes(tmp_path) == dict.fromkeys(tensors, (10,))
    with pytest.raises(CheckpointError, match="No weights"):
        saving.write_weights(tmp_path, iter(()))


def test_a_directory_is_whole_or_absent(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "deep" / "out") as part:
            (part / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as part:
        (part / "file").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="not empty"), atomic_directory(tmp_path / "out"):
        pass


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        WeightSource(tmp_path)
