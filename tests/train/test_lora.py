"""LoRA training: target modules, parameters trained beside the adapters, and complete checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.arguments import parse_arguments
from llava.errors import CheckpointError, ConfigError
from llava.model.builder import load_pretrained_model
from llava.train import checkpointing, model_setup
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import prepare, train
from tests import tiny
from tests.train import runs

Dirs = dict[str, Path]
DECODER = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PROJECTOR = {f"base_model.model.model.mm_projector.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")}
FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"),
    "non_lora_trainables.safetensors",
    *("special_tokens_map.json", "tokenizer.model", "tokenizer_config.json", "trainer_state.json"),
}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
IDS = torch.tensor([[1, 5, -200, 9, 11, 20]])
PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)


def flags(dirs: Dirs, data: Path, out: Path, **more: Any) -> list[str]:
    return runs.flags(dirs, data, out, 2, **{"lora_enable": True, "lora_r": 4, **more})


def prepared(dirs: Dirs, data: Path, out: Path, **more: Any) -> tuple[Any, Any]:
    """Model and tokenizer ready for the first step."""
    model, tokenizer, _ = prepare(*parse_arguments(flags(dirs, data, out, **more)))
    return model, tokenizer


def learning(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory: pytest.TempPathFactory) -> Dirs:
    """A CLIP tower, whose linear layers have the names of the decoder's, and bases with attention biases."""
    root = tmp_path_factory.mktemp("clip")
    tower = tiny.make_clip_tower(root / "clip-vit-tiny")
    return {
        "tower": tower,
        "base": tiny.make_base(root / "base", attention_bias=True),
        "chat": tiny.make_chat(root / "chat", tower, mm_vision_select_layer=-2),
    }


def test_adapters_are_on_the_decoder_only_when_fine_tuning_a_chat_model(
    with_clip: Dirs, small_data: Path, tmp_path: Path
) -> None:
    more = {"model_name_or_path": with_clip["chat"], "mm_vision_select_layer": -2}
    model, _ = prepared(with_clip, small_data, tmp_path, **more)
    adapted = {name.partition(".lora_")[0] for name in learning(model) if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == set(DECODER)
    assert len(adapted) == 2 * 7 and all(name.startswith("base_model.model.model.layers.") for name in adapted)
    assert {name for name in learning(model) if ".lora_" not in name} == PROJECTOR


@pytest.mark.parametrize(("bias", "trained"), [("none", False), ("lora_only", True), ("all", True)])
def test_lora_bias_trains_and_saves_decoder_biases_only(
    with_clip: Dirs, small_data: Path, tmp_path: Path, bias: str, trained: bool
) -> None:
    more = {"mm_vision_select_layer": -2, "lora_bias": bias, "max_steps": 2}
    train(flags(with_clip, small_data, tmp_path, **more))
    beside = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    attention = {f"base_model.model.model.layers.{i}.self_attn.{k}_proj.bias" for i in (0, 1) for k in "qkvo"}
    assert set(beside) == PROJECTOR | (attention if trained else set())
    assert not any(key.endswith("bias") for key in load_file(tmp_path / "adapter_model.safetensors"))
    _, model, _, _ = load_pretrained_model(tmp_path, device="cpu")
    bias_of_values = model.state_dict()["model.layers.0.self_attn.v_proj.bias"]
    assert bool(bias_of_values.any()) == trained


def test_parameters_trained_by_lora_bias() -> None:
    of_target, other = "model.layers.0.self_attn.q_proj.base_layer.bias", "model.norm.bias"
    trained = model_setup.is_trained_with_lora
    assert [trained(of_target, mode) for mode in ("none", "lora_only", "all")] == [False, True, True]
    assert [trained(other, mode) for mode in ("none", "lora_only", "all")] == [False, False, True]
    assert not trained("model.vision_tower.vision_tower.layers.0.q_proj.bias", "all")
    assert not trained("model.embed_tokens.weight", "all")


def test_adapters_and_projector_have_float32_masters_and_the_rest_16_bit(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    model, _ = prepared(tiny_dirs, small_data, tmp_path, bf16=True)
    for name, parameter in model.named_parameters():
        learns = "mm_projector" in name or ".lora_" in name
        assert parameter.requires_grad == learns
        assert parameter.dtype is (torch.float32 if learns else torch.bfloat16), name


def logits_of(model: Any) -> torch.Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, images=PIXELS).logits
    model.train(training)
    return logits


@pytest.mark.parametrize("more", [{}, {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}])
def test_checkpoints_load_with_the_logits_of_the_model_in_memory(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    seen: dict[int, torch.Tensor] = {}
    save = LLaVATrainer._save_checkpoint

    def watched(self: LLaVATrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        seen[self.state.global_step] = logits_of(self.model)

    monkeypatch.setattr(LLaVATrainer, "_save_checkpoint", watched)
    # a learning rate at which every step moves the logits by more than the tolerance
    train(flags(tiny_dirs, small_data, tmp_path, learning_rate=0.05, save_strategy="steps", save_steps=4, **more))
    assert not torch.allclose(seen[4], seen[8], atol=1e-2)
    for directory, step in ((tmp_path / "checkpoint-4", 4), (tmp_path / "checkpoint-8", 8), (tmp_path, 8)):
        tokenizer, model, _, _ = load_pretrained_model(directory, device="cpu")
        torch.testing.assert_close(logits_of(model), seen[step], atol=1e-4, rtol=0)
        assert len(tokenizer) == 384 + (3 if more else 0)
        names = {path.name for path in directory.iterdir() if path.is_file()}
        extra = {"added_tokens.json"} if more else set()
        assert names == FILES | extra | ({"README.md", "log.jsonl", "run.json"} if directory == tmp_path else STATE)
        beside = set(torch.load(directory / "non_lora_trainables.bin", weights_only=True))
        grown = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} if more else set()
        assert beside == PROJECTOR | grown
        settings = json.loads((directory / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tiny_dirs["base"])
        assert (settings["r"], settings["target_modules"], settings["inference_mode"]) == (4, DECODER, True)
        config = json.loads((directory / "config.json").read_text())
        assert config["conv_template"] == "v1" and config["mm_vision_tower"] == str(tiny_dirs["tower"])
        assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_adapters_settings_come_from_the_flags(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    model, _ = prepared(tiny_dirs, small_data, tmp_path, lora_r=2, lora_alpha=6, lora_dropout=0.25)
    layer = model.get_model().layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 3.0} and layer.lora_dropout["default"].p == 0.25
    assert tuple(layer.lora_A["default"].weight.shape) == (2, 48)


def test_gradient_checkpointing_changes_nothing(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    """Dropout included; with the projector frozen only the embeddings' hook lets gradients through."""
    more = {"max_steps": 3, "freeze_mm_mlp_adapter": True}
    train(flags(tiny_dirs, small_data, tmp_path / "plain", **more))
    train(flags(tiny_dirs, small_data, tmp_path / "saving", gradient_checkpointing=True, **more))
    assert runs.losses(tmp_path / "saving") == runs.losses(tmp_path / "plain")
    runs.assert_equal_weights(tmp_path / "saving", tmp_path / "plain", atol=1e-6)
    moved = load_file(tmp_path / "saving" / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in moved.items() if ".lora_B." in name)


def test_resume_is_exact_and_skips_incomplete_checkpoints(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a later epoch, with dropout, and image tokens that made the vocabulary grow."""
    more = {"num_train_epochs": 2, "lora_dropout": 0.3, "mm_use_im_start_end": True}
    argv = flags(tiny_dirs, small_data, tmp_path, save_strategy="steps", save_steps=5, **more)
    train(argv)
    before, losses = runs.tensors(tmp_path), runs.losses(tmp_path)
    for file in (tmp_path / "checkpoint-15").glob("non_lora_trainables.*"):
        file.unlink()
    (tmp_path / "checkpoint-10" / "adapter_config.json").unlink()
    train(argv)
    assert "checkpoint-15: its weights cannot be read" in caplog.text
    assert f"Resuming from {tmp_path / 'checkpoint-5'}" in caplog.text
    assert runs.losses(tmp_path) == losses and len(losses) == 16
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(tmp_path).items())


def test_a_checkpoint_of_other_adapters_is_not_resumed(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    model, tokenizer = prepared(tiny_dirs, small_data, tmp_path)
    checkpointing.save_lora(model, tokenizer, tmp_path / "a", is_writer=True)
    other, _ = prepared(tiny_dirs, small_data, tmp_path, lora_r=8)
    with pytest.raises(CheckpointError, match=r"is \(4, "):
        checkpointing.load_lora(other, tmp_path / "a")
    with_rows, _ = prepared(tiny_dirs, small_data, tmp_path, mm_use_im_start_end=True)
    with pytest.raises(CheckpointError, match="is missing in"):
        checkpointing.load_lora(with_rows, tmp_path / "a")


def test_layers_outside_the_decoder_are_not_adapted() -> None:
    """A projector of a chat model whose layers end as those of the decoder."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"up_proj": torch.nn.Linear(2, 2)})})
    assert model_setup.target_modules(model) == ["up_proj"]
    model["mm_projector"] = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(2, 2)})
    assert model_setup.target_modules(model) == ["layers.up_proj"]


def test_a_save_is_verified(tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = prepared(tiny_dirs, small_data, tmp_path)
    write = checkpointing.write_tensors
    monkeypatch.setattr(checkpointing, "write_tensors", lambda path, state: write(path, dict(list(state.items())[1:])))
    with pytest.raises(CheckpointError, match="1 missing"):
        checkpointing.save_lora(model, tokenizer, tmp_path / "a", is_writer=True)


def test_a_new_pad_token_is_refused_with_lora(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[PAD\]"):
        prepared(tiny_dirs, small_data, tmp_path, version="v0")


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "bf16": True, "lora_dropout": 0.3}
    train(flags(tiny_dirs, small_data, whole, **more))
    argv = flags(tiny_dirs, small_data, killed, **more)
    runs.kill_at(argv, killed, 5, tmp_path / "log")
    assert not (killed / "trainer_state.json").exists()
    runs.finish(argv, tmp_path / "log")
    assert "Resuming from" in (tmp_path / "log").read_text()
    runs.assert_equal_runs(whole, killed)
    assert [path.name for path in killed.glob("*checkpoint-*")] == ["checkpoint-6"]
