"""LoRA adapters in the forms other programs write them: PEFT's own merge of the language model is the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.errors import CheckpointError
from llava.model import merge
from llava.model.check import examine
from llava.model.checkpoint import Kind
from llava.model.registry import language_model_spec
from tests import tiny
from tests.model.test_builder import load, logits

DECODER = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FORMS: dict[str, dict[str, Any]] = {
    "as published": {"target_modules": DECODER},
    "regular expression": {"target_modules": r".*\.(q_proj|k_proj|out_proj|fc1)"},
    "one layer": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "ranks and scales by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 16}},
    "rank-stabilized": {"use_rslora": True},
    "weight-decomposed": {"use_dora": True},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules saved whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms saved whole": {"modules_to_save": ["norm"]},
    "biases": {"bias": "all"},
    "initialized from the base": {"init_lora_weights": "gaussian"},
}


@dataclass(frozen=True)
class Models:
    root: Path
    base: Path
    chat: Path
    mpt_base: Path
    mpt_chat: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Bases and chat models whose CLIP tower has layers named as those of the decoder."""
    root = tmp_path_factory.mktemp("clip")
    clip = tiny.make_clip_tower(root / "clip")
    mpt = tiny.make_mpt_chat(root / "mpt-chat", clip, mm_vision_select_layer=-2)
    base, chat = tiny.make_base(root / "base"), tiny.make_chat(root / "chat", clip, mm_vision_select_layer=-2)
    return Models(root, base, chat, tiny.make_mpt_base(root / "mpt-base"), mpt)


@pytest.fixture
def run(models: Models, tmp_path: Path) -> Path:
    return tiny.make_lora(tmp_path / "run", models.chat, models.base, target_modules=["q_proj", "k_proj", "v_proj"])


def by_peft(run: Path, base: Path) -> dict[str, Tensor]:
    """The weights of language model and projector, merged by PEFT in a model without a tower."""
    spec = language_model_spec(json.loads((run / "config.json").read_text())["model_type"], str(run))
    model = spec.model(spec.config.from_pretrained(run))
    beside = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    state = {name.removeprefix("base_model.model."): value for name, value in beside.items()}
    missing = model.load_state_dict({**load_file(base / "model.safetensors"), **state}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}  # tied in MPT
    adapted = peft.PeftModel.from_pretrained(model, str(run))
    merged: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return merged


def check_both(run: Path, expected: dict[str, Tensor], out: Path) -> None:
    """Loading and merging agree with `expected`, and with each other about the logits."""
    assert examine(run).found.kind is Kind.LORA
    loaded = load(run)
    assert merge.main(["--model-path", str(run), "--save-model-path", str(out)]) == 0
    merged = load(out)
    for model in (loaded, merged):
        state = model.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_peft(form: str, models: Models, tmp_path: Path) -> None:
    run = tiny.make_lora(tmp_path / "run", models.chat, models.base, **FORMS[form])
    check_both(run, by_peft(run, models.base), tmp_path / "out")


def test_an_adapter_of_mpt(models: Models, tmp_path: Path) -> None:
    """MPT and CLIP both have an `out_proj`."""
    targets = ["Wqkv", "out_proj", "up_proj", "down_proj"]
    run = tiny.make_lora(tmp_path / "run", models.mpt_chat, models.mpt_base, target_modules=targets)
    check_both(run, by_peft(run, models.mpt_base), tmp_path / "out")


def test_the_tower_keeps_its_weights(run: Path, models: Models, tmp_path: Path) -> None:
    merge.merge(run, None, tmp_path / "out")
    saved, tower = load_file(tmp_path / "out" / "model.safetensors"), load_file(models.root / "clip/model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    kept = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    assert len(kept) > 50
    assert all(torch.equal(value, tower[name]) for name, value in kept.items())


# --- files and settings of other programs and versions ----------------------------------------------------------------


def rename(run: Path, new_name: Callable[[str], str]) -> None:
    state = load_file(run / "adapter_model.safetensors")
    save_file({new_name(name): value for name, value in state.items()}, run / "adapter_model.safetensors")


def edit(run: Path, **changes: Any) -> None:
    file = run / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


RENAMED: dict[str, Callable[[str], str]] = {
    "without the prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: re.sub(r"\.(lora_[AB])\.", r".\1.default.", name),
}


@pytest.mark.parametrize("form", RENAMED)
def test_other_names_of_the_tensors(form: str, run: Path) -> None:
    expected = logits(load(run))
    rename(run, RENAMED[form])
    assert torch.equal(logits(load(run)), expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "exclude_modules": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "exclude_modules": ["o_proj"]},
    "exclude_modules, a regular expression": {"target_modules": r".*_proj", "exclude_modules": r".*(o|e|p|n)_proj"},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "new settings, off": {"eva_config": None, "corda_config": None, "lora_bias": False, "trainable_token_indices": None,
                          "use_qalora": False, "qalora_group_size": 16, "target_parameters": None},
    "another task": {"task_type": None, "inference_mode": False},
    "no ranks by layer": {"rank_pattern": None, "alpha_pattern": None},
}  # fmt: skip


@pytest.mark.parametrize("form", SETTINGS)
def test_settings_of_a_newer_peft(form: str, run: Path) -> None:
    expected = logits(load(run))
    edit(run, **SETTINGS[form])
    assert torch.equal(logits(load(run)), expected)
    assert examine(run).found.kind is Kind.LORA


def test_all_linear_layers(models: Models, tmp_path: Path) -> None:
    """The shorthand means the layers of the decoder: PEFT would also adapt those of projector and tower."""
    run = tiny.make_lora(tmp_path / "run", models.chat, models.base, target_modules=DECODER)
    expected = by_peft(run, models.base)
    edit(run, target_modules="all-linear")
    check_both(run, expected, tmp_path / "out")


def said_by_all(run: Path, out: Path) -> str:
    """The one sentence with which chat, check and merge refuse the adapter."""
    sentences = set()
    for refuse in (load, examine, lambda path: merge.merge(path, None, out)):
        with pytest.raises(CheckpointError) as said:
            refuse(run)
        sentences.add(str(said.value))
    assert len(sentences) == 1, sentences
    assert not out.exists()
    return sentences.pop()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another rank": (lambda run: edit(run, r=8), "cannot be attached.*rank 8"),
    "another rank of one layer": (lambda run: edit(run, rank_pattern={"k_proj": 2}), "cannot be attached.*rank 2"),
    "more target modules": (lambda run: edit(run, target_modules=DECODER), "disagree about .*_proj"),
    "fewer target modules": (lambda run: edit(run, target_modules=["q_proj", "k_proj"]), "disagree about .*v_proj"),
    "another layer": (lambda run: edit(run, layers_to_transform=[0]), "disagree about model.layers.1"),
    "modules to save": (lambda run: edit(run, modules_to_save=["lm_head"]), "disagree about lm_head.weight"),
    "DoRA": (lambda run: edit(run, use_dora=True), "disagree about model.layers.0"),
    "trained bias of B": (lambda run: edit(run, lora_bias=True), "sets lora_bias"),
    "CorDA": (lambda run: edit(run, init_lora_weights="corda", corda_config={"x": 1}), "sets corda_config"),
    "trained tokens": (lambda run: edit(run, trainable_token_indices=[1]), "sets trainable_token_indices"),
    "no regular expression": (lambda run: edit(run, target_modules="("), "cannot be attached"),
    "of layers that the tower does not have": (
        lambda run: rename(run, lambda name: name.replace("model.layers.1.", "model.vision_tower.vision_tower.x.")),
        r"vision_tower.x.*but the base has .* \(no such weight\)",
    ),
    "of integers": (
        lambda run: save_file(
            {name: value.to(torch.int8) for name, value in load_file(run / "adapter_model.safetensors").items()},
            run / "adapter_model.safetensors",
        ),
        "is not floating-point: the weights are quantized",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_by_all_with_one_sentence(form: str, run: Path, tmp_path: Path) -> None:
    change, words = REFUSED[form]
    change(run)
    assert re.search(words, said_by_all(run, tmp_path / "out"))


# --- two formats side by side -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["adapter_model", "non_lora_trainables"])
def test_safetensors_and_bin_must_agree(stem: str, run: Path, tmp_path: Path) -> None:
    expected = logits(load(run))
    safe, pickled = run / f"{stem}.safetensors", run / f"{stem}.bin"
    state = load_file(safe) if safe.is_file() else torch.load(pickled, weights_only=True)
    save_file(state, safe, metadata={"format": "pt"})
    torch.save(state, pickled)
    assert torch.equal(logits(load(run)), expected)
    name = max(state)
    state[name].view(-1)[len(state[name].view(-1)) // 2] += 1
    torch.save(state, pickled)
    sentence = said_by_all(run, tmp_path / "out")
    assert f"differ in {name}: {safe.name} and {pickled.name}" in sentence
    pickled.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert torch.equal(logits(load(run)), expected)
    safe.unlink()
    assert "Git LFS pointer" in said_by_all(run, tmp_path / "out")


def test_fully_trained_weights_named_by_a_newer_peft(models: Models, tmp_path: Path) -> None:
    run = tiny.make_lora(tmp_path / "run", models.chat, models.base)
    expected = logits(load(run))
    state = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    renamed = {re.sub(r"\.(weight|bias)$", r".base_layer.\1", name): value for name, value in state.items()}
    torch.save(renamed, run / "non_lora_trainables.bin")
    assert torch.equal(logits(load(run)), expected)
