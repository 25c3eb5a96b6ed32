"""LoRA adapters are loaded strictly; a merge is verified and atomic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.arguments import parse_arguments
from llava.errors import CheckpointError, ConfigError
from llava.model import builder, lora, merge
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.checkpoint import Kind, inspect
from llava.train.train import run
from tests import tiny
from tests.model.test_builder import IDS, PIXELS, edit_config, load, logits
from tests.model.test_chat_template import holds_template
from tests.test_package import ROOT
from tests.train import runs


@pytest.fixture
def adapter(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    return tiny.make_lora(tmp_path / "run", tiny_dirs["chat"], tiny_dirs["base"])


def rewrite(directory: Path, change: Any) -> None:
    state = load_file(directory / "adapter_model.safetensors")
    change(state)
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})


# --- loading -------------------------------------------------------------------------------------------------------


def test_the_formula_of_an_adapter(adapter: Path, tiny_dirs: dict[str, Path]) -> None:
    """The merged weights are W + (alpha / r) B A where adapted, else those of the base named by the adapter."""
    model = load(adapter).state_dict()
    base = load_file(tiny_dirs["base"] / "model.safetensors")
    state = load_file(adapter / "adapter_model.safetensors")
    for name, value in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = state[key + "B.weight"] @ state[key + "A.weight"] if key + "A.weight" in state else 0
        torch.testing.assert_close(model[name], value + 2.0 * product)
    chat = load_file(tiny_dirs["chat"] / "model.safetensors")
    assert torch.equal(model["model.mm_projector.0.weight"], chat["model.mm_projector.0.weight"])


def test_bin_and_safetensors_alike(adapter: Path) -> None:
    expected = logits(load(adapter))
    state = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(state, adapter / "adapter_model.bin")
    assert torch.equal(logits(load(adapter)), expected)


def test_an_adapter_is_refused_before_its_base_is_read(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    edit_config(adapter, vocab_size=32000)
    with pytest.raises(CheckpointError, match="vocabulary of 32000"):
        load(adapter)
    edit_config(adapter, vocab_size=384)
    (adapter / "adapter_model.safetensors").rename(adapter / "kept")
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        load(adapter)
    (adapter / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match="has no non_lora_trainables.bin"):
        load(adapter)


def test_the_base_is_asked_for_and_checked(tiny_dirs: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    nameless = tiny.make_lora(tmp_path / "nameless", tiny_dirs["chat"], tiny_dirs["base"], name_base=False)
    with pytest.raises(CheckpointError, match="--model-base"):
        load(nameless)
    assert torch.equal(logits(load(nameless, tiny_dirs["base"])), logits(load(adapter)))
    with pytest.raises(CheckpointError, match="hidden_size=48.*hidden_size=32"):
        load(adapter, tiny.make_base(tmp_path / "narrow", hidden_size=32))
    plain = shutil.copytree(tiny_dirs["base"], tmp_path / "plain")
    edit_config(plain, vocab_size=None, num_attention_heads=None)  # as if these were the library's defaults
    with pytest.raises(CheckpointError, match="num_attention_heads=4, but .* num_attention_heads=32"):
        load(adapter, plain)
    edit_config(plain, num_attention_heads=4)
    with pytest.raises(CheckpointError, match="vocabulary of 384, but this base has 32000"):
        load(adapter, plain)
    settings = adapter / "adapter_config.json"
    kept = settings.read_text()
    settings.write_text(json.dumps({**json.loads(kept), "base_model_name_or_path": "/home/trainer/vicuna"}))
    with pytest.raises(
        CheckpointError, match="The base '/home/trainer/vicuna' of .* does not exist here; pass .* --mod"
    ):
        load(adapter)
    settings.write_text(kept)
    edit_config(adapter, vocab_size=32000)
    for refuse in (load, examine):
        with pytest.raises(CheckpointError, match="vocabulary of 32000, but this base has 384"):
            refuse(adapter)


def test_a_run_with_image_tokens(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A run that added two fully trained rows to the 384 of the base loads, checks and merges."""
    flags = {"mm_use_im_start_end": True, "vocab_size": 386}
    chat = tiny.make_chat(tmp_path / "chat", tiny_dirs["tower"], **flags)
    run = tiny.make_lora(tmp_path / "run", chat, tiny_dirs["base"])
    rows = torch.randn(386, 48)
    state = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    torch.save({**state, "base_model.model.model.embed_tokens.weight": rows}, run / "non_lora_trainables.bin")
    assert examine(run).found.kind is Kind.LORA
    assert torch.equal(load(run).model.embed_tokens.weight, rows)
    merge.merge(run, None, tmp_path / "merged")
    assert examine(run, tmp_path / "merged").found.kind is Kind.LORA  # on a base whose tokenizer has the two
    tokenizer, merged, _, _ = load_pretrained_model(tmp_path / "merged", device="cpu")
    assert len(tokenizer) == 386
    assert torch.equal(merged.model.embed_tokens.weight, rows)


def test_an_adapter_is_used_whole_or_refused(adapter: Path, tiny_dirs: dict[str, Path]) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    whole = load_file(adapter / "adapter_model.safetensors")
    rewrite(adapter, lambda state: state.pop(key + "B.weight"))
    with pytest.raises(CheckpointError, match="no counterpart"):
        load(adapter)
    rewrite(adapter, lambda state: state.update({key + "B.weight": torch.zeros(40, 4)}))
    with pytest.raises(CheckpointError, match=r"\(40, 4\), but the base has .* \(48, 48\)"):
        load(adapter)
    save_file(whole, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    with pytest.raises(CheckpointError, match="disagree about .*v_proj"):
        load(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"\x10damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        load(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors or adapter_model.bin"):
        load(adapter)


def test_settings_of_another_peft(adapter: Path) -> None:
    expected = logits(load(adapter))
    edit = adapter / "adapter_config.json"
    settings = json.loads(edit.read_text())
    edit.write_text(json.dumps({**settings, "eva_config": None, "lora_bias": False, "peft_version": "0.99"}))
    assert torch.equal(logits(load(adapter)), expected)
    edit.write_text(json.dumps({**settings, "lora_bias_of_tomorrow": True}))
    with pytest.raises(CheckpointError, match=r"sets lora_bias_of_tomorrow, which peft .* does not support here"):
        load(adapter)
    edit.write_text(json.dumps({**settings, "megatron_config": {"a": 1}, "megatron_core": "antigravity"}))
    with pytest.raises(CheckpointError, match="sets megatron_config"):  # PEFT would import what the adapter names
        load(adapter)
    for nonsense in ({"lora_alpha": "x"}, {"target_modules": "("}, {"r": 8}):
        edit.write_text(json.dumps({**settings, **nonsense}))
        with pytest.raises(CheckpointError, match="cannot be attached to this model") as said:
            load(adapter)
        assert len(str(said.value)) < 700
    edit.write_text(json.dumps({**settings, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(CheckpointError, match="type PREFIX_TUNING; only LORA"):
        load(adapter)
    edit.write_text(json.dumps({**settings, "target_modules": ["nothing_of_this_name"]}))
    with pytest.raises(CheckpointError, match="cannot be attached to this model .*Target modules"):
        load(adapter)


def test_the_trained_projector_is_needed_and_fits(adapter: Path) -> None:
    file = adapter / "non_lora_trainables.bin"
    state = torch.load(file, weights_only=True)
    key = "base_model.model.model.mm_projector.0.weight"
    torch.save({**state, key: state[key][:, :-1]}, file)
    with pytest.raises(CheckpointError, match=r"\(48, 31\), but the model has \(48, 32\)"):
        load(adapter)
    torch.save({"base_model.model.lm_head.weight": torch.zeros(384, 48)}, file)
    with pytest.raises(CheckpointError, match="no projector weights"):
        load(adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no non_lora_trainables.bin.*same step"):
        load(adapter)


# --- merging -------------------------------------------------------------------------------------------------------


def test_merge_and_load(adapter: Path, tiny_dirs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    edit_config(adapter, quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    out = tmp_path / "merged"
    assert merge.main(["--model-path", str(adapter), "--save-model-path", str(out)]) == 0
    assert "4 weights changed, saved as float32" in capsys.readouterr().out
    assert inspect(out).kind is Kind.FULL
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["conv_template"] == "v1" and holds_template(out, "v1")
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert "_name_or_path" not in config or config["_name_or_path"] == ""
    tokenizer, model, _, _ = load_pretrained_model(out, device="cpu")
    assert len(tokenizer) == 384
    torch.testing.assert_close(logits(model), logits(load(adapter, tiny_dirs["base"])), atol=1e-5, rtol=1e-5)
    tower = load_file(out / "model.safetensors")
    assert "model.vision_tower.vision_tower.encoder.layers.5.ls1" in tower  # whole, also what no feature needs
    before = logits(model)
    edit_config(out, mm_vision_tower="/no/longer/there")
    assert torch.equal(logits(load(out)), before)
    assert list(tmp_path.glob(".*")) == []
    assert merge.main(["--model-path", str(adapter), "--save-model-path", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_merged_in_float32_and_saved_in_the_dtype_of_the_base(
    adapter: Path, tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_dirs["base"], tmp_path / "half")
    weights = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert merge.merge(adapter, base, tmp_path / "merged").dtype is torch.bfloat16
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    state = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    key = f"base_model.model.{name}.lora_"
    exact = weights[name + ".weight"].float() + 2.0 * (state[key + "B.weight"] @ state[key + "A.weight"])
    assert torch.equal(saved[name + ".weight"], exact.bfloat16())


def test_a_tampered_merge_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    arguments = ["--model-path", str(adapter), "--save-model-path", str(tmp_path / "merged")]

    def refused(words: str) -> None:
        assert merge.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    plain = lora.merge_adapter
    monkeypatch.setattr(lora, "merge_adapter", lambda adapted, directory: adapted.unload())
    refused("The merged and the unmerged model do not agree")

    def nudged(adapted: Any, directory: Path) -> Any:
        model = plain(adapted, directory)
        model.model.layers[0].self_attn.q_proj.weight.data[0] += 1.0
        return model

    monkeypatch.setattr(lora, "merge_adapter", nudged)
    refused("do not agree")
    monkeypatch.setattr(lora, "merge_adapter", plain)

    save = merge.save

    def falsified(model: Any, tokenizer: Any, directory: Path) -> None:
        save(model, tokenizer, directory)
        state = load_file(directory / "model.safetensors")
        state["lm_head.weight"][7] += 1.0
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "save", falsified)
    refused("does not load as the merged model")
    monkeypatch.setattr(merge, "save", save)

    rewrite(adapter, lambda state: state.update({k: torch.zeros_like(v) for k, v in state.items() if "lora_B" in k}))
    refused("does not change any weight")
    rewrite(adapter, lambda state: state.update({k: v * torch.nan for k, v in state.items()}))
    refused("cannot be merged")


def test_only_adapters_are_merged(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a full chat checkpoint; only a LoRA adapter"):
        merge.merge(tiny_dirs["chat"], None, tmp_path / "out")
    (tmp_path / "taken").write_text("a file")
    run = tiny.make_lora(tmp_path / "run", tiny_dirs["chat"], tiny_dirs["base"])
    with pytest.raises(ConfigError, match="not empty"):
        merge.merge(run, None, tmp_path / "taken")


def test_the_script(adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/merge_lora_weights.py", "--model-path", str(adapter)]
    done = subprocess.run(
        [*command, "--save-model-path", str(tmp_path / "merged")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert inspect(tmp_path / "merged").kind is Kind.FULL


def test_trained_merged_and_loaded_is_the_model_in_memory(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    data = runs.make_data(tmp_path / "mix", samples=8)
    more = {"lora_enable": True, "lora_r": 4, "max_steps": 2, "learning_rate": 0.05}
    trainer = run(*parse_arguments(runs.flags(tiny_dirs, data, tmp_path / "run", 2, **more)))
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=IDS, images=PIXELS).logits
    torch.testing.assert_close(logits(load(tmp_path / "run")), expected, atol=1e-5, rtol=1e-5)
    done = merge.merge(tmp_path / "run", None, tmp_path / "merged")
    assert done.changed == 14
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)
