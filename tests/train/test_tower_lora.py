"""LoRA on the vision tower, DoRA and rsLoRA: trained, saved, loaded, merged, resumed, and read by PEFT alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import eva

from llava.arguments import parse_arguments
from llava.errors import CheckpointError
from llava.model import builder, lora, merge
from llava.model.check import examine
from llava.model.checkpoint import Kind, inspect
from llava.train import estimate
from llava.train.estimate_inputs import UNKNOWN_DATA, RecipeFlags
from llava.train.model_setup import target_modules
from llava.train.throughput import trainable_parts
from llava.train.train import run, train
from tests import tiny
from tests.model.test_builder import edit_config, load, logits
from tests.model.test_timm import EVA02, register, small_models, weights
from tests.train import runs
from tests.train.test_deepspeed import LOSS_ATOL, WEIGHT_ATOL, options
from tests.train.test_lora import DECODER, PROJECTOR, flags, learning, prepared

__all__ = ["small_models"]
Dirs = dict[str, Path]
TOWER = "model.vision_tower.vision_tower."
TOWER_LORA: dict[str, Any] = {"mm_vision_lora_r": 2, "lora_alpha": 8}
FORMS: dict[str, dict[str, Any]] = {
    "internvit": {**TOWER_LORA},
    "clip": {**TOWER_LORA, "mm_vision_select_layer": -2},
    "internvit, DoRA": {**TOWER_LORA, "use_dora": True},
    "clip, DoRA and rsLoRA": {**TOWER_LORA, "mm_vision_select_layer": -2, "use_dora": True, "use_rslora": True},
    "timm": {**TOWER_LORA, "mm_vision_select_layer": -2},
    "timm EVA": {**TOWER_LORA, "mm_vision_select_layer": -2},
    "timm EVA, fused": {**TOWER_LORA, "mm_vision_select_layer": -2},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
}
LAST = {
    "internvit": ["fc1", "fc2", "proj", "qkv"],
    "clip": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
}


@pytest.fixture(scope="module")
def towers(tiny_dirs: Dirs, small_models: None, tmp_path_factory: pytest.TempPathFactory) -> Dirs:
    root = tmp_path_factory.mktemp("towers")
    register(eva, "eva02_fused_test", eva._create_eva, **{**EVA02, "qkv_fused": True})
    timm = {"timm": "vit_test_reg4_dinov2", "timm EVA": "eva02_test", "timm EVA, fused": "eva02_fused_test"}
    for form in timm:
        (root / form).mkdir()
    return {
        "internvit": tiny_dirs["tower"],
        "clip": tiny.make_clip_tower(root / "clip-vit-tiny"),
        **{form: Path(f"timm/{name}:{weights(root / form, name)}") for form, name in timm.items()},
    }


def of_form(form: str, towers: Dirs, tiny_dirs: Dirs) -> tuple[Dirs, dict[str, Any]]:
    """The directories and the flags of a form."""
    tower = towers.get(form, towers.get(form.partition(",")[0], towers["internvit"]))
    return {**tiny_dirs, "tower": tower}, FORMS[form]


def by_peft(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of base and tower, merged by PEFT as `adapter_config.json` says."""
    found = inspect(directory)
    base = builder.resolve_base(found, None)
    assert base is not None
    _, model = merge.load_unmerged(found, base)
    merged: dict[str, torch.Tensor] = (
        peft.PeftModel.from_pretrained(model, str(directory)).merge_and_unload().state_dict()
    )
    return merged


@pytest.mark.parametrize("form", FORMS)
def test_trained_loaded_and_merged_is_the_model_in_memory(
    form: str, towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    dirs, more = of_form(form, towers, tiny_dirs)
    out = tmp_path / "run"
    argv = flags(dirs, small_data, out, learning_rate=0.03, max_steps=2, lora_dropout=0, **more)
    trainer = run(*parse_arguments(argv))
    expected = logits(trainer.model.eval())
    moved = load_file(out / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in moved.items() if ".lora_B." in name)

    assert examine(out).found.kind is Kind.LORA
    loaded = load(out)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    state = loaded.state_dict()
    for name, value in by_peft(out).items():
        torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-6, msg=name)
    done = merge.merge(out, None, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)
    assert done.changed == len({name.partition(".lora_")[0] for name in moved}) >= 2 * len(DECODER)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_chat_model_with_a_tuned_tower_keeps_it(tiny_dirs: Dirs, small_data: Path, tmp_path: Path, rank: int) -> None:
    """Training takes the tower in the chat model, not that of `--vision_tower`; so do loading, checking and merging."""
    chat = tiny.make_chat(tmp_path / "chat", tiny_dirs["tower"], embed_tower=True)
    state = load_file(chat / "model.safetensors")
    tuned = {name: value + 0.3 if "vision_tower" in name else value for name, value in state.items()}
    save_file(tuned, chat / "model.safetensors", metadata={"format": "pt"})
    more = {"learning_rate": 0.03, "max_steps": 2, "mm_vision_lora_r": rank}
    out = tmp_path / "run"
    trainer = run(*parse_arguments(flags({**tiny_dirs, "base": chat}, small_data, out, **more)))
    expected = logits(trainer.model.eval())
    torch.testing.assert_close(logits(load(out)), expected, atol=1e-4, rtol=1e-4)
    assert str(chat) in next(part.detail for part in examine(out).parts if part.name == "vision tower")
    merge.merge(out, None, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


def test_the_adapter_of_the_tower_is_part_of_the_adapter(
    towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    """All linear layers, at the decoder's scale and the tower's rank; nothing else is trained."""
    for form, last in LAST.items():
        dirs, more = of_form(form, towers, tiny_dirs)
        model, _ = prepared(dirs, small_data, tmp_path, bf16=True, **more)
        assert {name for name in learning(model) if ".lora_" not in name} == PROJECTOR
        adapted = {name.partition(".lora_")[0] for name in learning(model) if TOWER in name}
        assert len(adapted) == len(last) * 3 and {name.rpartition(".")[2] for name in adapted} == set(last)
        settings = model.peft_config["default"]
        assert settings.target_modules == {*DECODER, *last}
        assert settings.rank_pattern == {"vision_tower.*": 2} and settings.alpha_pattern == {"vision_tower.*": 4}
        layer = model.get_submodule(min(adapted))
        assert (layer.r, layer.scaling) == ({"default": 2}, {"default": 2.0})
        decoder = model.get_model().layers[0].self_attn.q_proj
        assert (decoder.r, decoder.scaling) == ({"default": 4}, {"default": 2.0})
        for name, parameter in model.named_parameters():
            assert parameter.dtype is (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_targets_are_whole_names_where_a_convolution_has_the_name_of_a_layer(
    towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    dirs, more = of_form("timm", towers, tiny_dirs)
    model, _ = prepared(dirs, small_data, tmp_path, **more)
    targets = model.peft_config["default"].target_modules
    assert f"{TOWER}blocks.0.attn.proj" in targets and f"{TOWER}patch_embed.proj" not in targets
    assert target_modules(torch.nn.ModuleDict({"proj": torch.nn.Linear(2, 2)})) == ["proj"]


@pytest.mark.parametrize(("form", "scale"), [("rsLoRA", 16 / 4**0.5), ("clip, DoRA and rsLoRA", 8 / 4**0.5)])
def test_rslora_divides_by_the_root_of_the_rank(
    form: str, scale: float, towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    dirs, more = of_form(form, towers, tiny_dirs)
    model, _ = prepared(dirs, small_data, tmp_path, **more)
    assert model.get_model().layers[0].self_attn.q_proj.scaling == {"default": scale}
    if "mm_vision_lora_r" in more:
        layer = model.get_vision_tower().vision_tower.vision_model.encoder.layers[0].self_attn.q_proj
        assert layer.scaling == {"default": 8 / 2**0.5}


def test_rates_and_counts_of_the_adapters(towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    dirs, more = of_form("internvit, DoRA", towers, tiny_dirs)
    rates = {"mm_vision_tower_lr": 1e-4, "mm_vision_layer_decay": 0.5, "llm_layer_decay": 0.5}
    argv = flags(dirs, small_data, tmp_path, **more, **rates, max_steps=1, weight_decay=0)
    trainer = run(*parse_arguments(argv))
    found = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    name = f"base_model.model.{TOWER}encoder.layers.%d.attn.qkv.lora_B.default.weight"
    assert [found[id(trainer.model.get_parameter(name % i))] for i in range(3)] == pytest.approx([25e-6, 5e-5, 1e-4])
    name = "base_model.model.model.layers.%d.mlp.up_proj.lora_magnitude_vector.default.weight"
    assert [found[id(trainer.model.get_parameter(name % i))] for i in range(2)] == pytest.approx([1e-3, 2e-3])
    estimated = estimate.run_config(RecipeFlags.of(*parse_arguments(argv)), 1, UNKNOWN_DATA)
    counted = trainable_parts(trainer.model)
    assert (estimated.trainable.adapters, estimated.trainable.tower_adapters) == (6912, 2976)
    assert (counted.adapters, counted.tower_adapters) == (6912, 2976) and not counted.tower
    frozen = estimate.run_config(RecipeFlags.of(*parse_arguments(flags(dirs, small_data, tmp_path))), 1, UNKNOWN_DATA)
    assert estimate.tower_bytes(estimated) > 2 * estimate.tower_bytes(frozen)


@pytest.mark.parametrize("form", ["internvit, DoRA", "clip"])
def test_a_resume_is_exact(form: str, towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    dirs, more = of_form(form, towers, tiny_dirs)
    argv = flags(dirs, small_data, tmp_path, lora_dropout=0.3, bf16=True, save_strategy="steps", save_steps=4, **more)
    train(argv)
    before, losses = runs.tensors(tmp_path), runs.losses(tmp_path)
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    train(argv)
    assert runs.losses(tmp_path) == losses and len(losses) == 8
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(tmp_path).items())


def test_gradient_checkpointing_changes_nothing(
    towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    dirs, more = of_form("clip", towers, tiny_dirs)
    train(flags(dirs, small_data, tmp_path / "plain", max_steps=3, **more))
    train(flags(dirs, small_data, tmp_path / "saving", max_steps=3, gradient_checkpointing=True, **more))
    assert runs.losses(tmp_path / "saving") == runs.losses(tmp_path / "plain")
    runs.assert_equal_weights(tmp_path / "saving", tmp_path / "plain", atol=1e-6)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_dirs: Dirs, towers: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter is on decoder and tower, with DoRA."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    base = tiny.make_base(out.parent / "base", hidden_size=64, intermediate_size=128)  # whole blocks in 4 bit
    dirs, more = of_form("internvit, DoRA", towers, {**tiny_dirs, "base": base})
    train(flags(dirs, small_data, out, learning_rate=0.03, max_steps=2, **more))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_have_the_dtype_that_is_loaded(adapter: Path, dtype: torch.dtype) -> None:
    model = load(adapter, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    full = load(adapter).state_dict()
    name = f"{TOWER}encoder.layers.0.attn.qkv.weight"
    torch.testing.assert_close(model.state_dict()[name].float(), full[name], atol=0.02, rtol=0.02)


def test_a_merged_adapter_is_quantized(adapter: Path) -> None:
    model = load(adapter, load_4bit=True)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype is torch.uint8
    assert torch.equal(model.state_dict()[f"{TOWER}encoder.layers.0.mlp.fc1.weight"],
                       load(adapter).state_dict()[f"{TOWER}encoder.layers.0.mlp.fc1.weight"])  # fmt: skip


def test_an_adapter_of_another_tower_is_refused(adapter: Path, tiny_dirs: Dirs, tmp_path: Path) -> None:
    """By chat, check and merge with one sentence, before weights are read."""
    run = shutil.copytree(adapter, tmp_path / "run")
    edit_config(run, mm_vision_tower=str(tiny.make_tower(tmp_path / "wide", intermediate_size=48)),
                mm_vision_tower_config=None)  # fmt: skip
    sentences = set()
    for refuse in (load, examine, lambda path: merge.merge(path, None, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"fc1.* but the base has .*fc1.weight \(48, 32\)") as said:
            refuse(run)
        sentences.add(str(said.value))
    assert len(sentences) == 1


def test_the_settings_and_the_tensors_of_the_tower_agree(adapter: Path, tmp_path: Path) -> None:
    run = shutil.copytree(adapter, tmp_path / "run")
    file = run / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "rank_pattern": {}}))
    with pytest.raises(CheckpointError, match="has rank 4"):
        load(run)
    file.write_text(json.dumps(settings))
    state = load_file(run / "adapter_model.safetensors")
    part = "vision_tower.vision_tower.encoder.layers.1.mlp.fc1"
    save_file({name: value for name, value in state.items() if part not in name}, run / "adapter_model.safetensors")
    for refuse in (load, examine):
        with pytest.raises(CheckpointError, match=f"disagree about .*{part}"):
            refuse(run)


def test_an_adapter_of_the_tower_alone_is_merged(adapter: Path, tmp_path: Path) -> None:
    """As other programs may write it."""
    run = shutil.copytree(adapter, tmp_path / "run")
    state = load_file(run / "adapter_model.safetensors")
    save_file({name: value for name, value in state.items() if TOWER in name}, run / "adapter_model.safetensors")
    file = run / "adapter_config.json"
    targets = r".*vision_tower.*\.(qkv|proj|fc1|fc2)"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": targets}))
    expected = logits(load(run))
    assert merge.merge(run, None, tmp_path / "merged").changed == 12
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_a_text_only_model_has_no_tower_to_adapt(adapter: Path) -> None:
    shapes = lora.adapter_shapes(adapter)
    assert lora.adapts_tower(shapes)
    text = {name: tuple(value.shape) for name, value in load(adapter).state_dict().items() if TOWER not in name}
    with pytest.raises(CheckpointError, match="no such weight"):
        lora.check_adapter(shapes, text, adapter)


# --- two ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_equal_one_process(
    towers: Dirs, tiny_dirs: Dirs, small_data: Path, tmp_path: Path, zero: str
) -> None:
    """With DoRA and all rates; also where a rank has a batch without an image."""
    dirs, form = of_form("internvit, DoRA", towers, tiny_dirs)
    rates = {"mm_projector_lr": 1e-3, "mm_vision_tower_lr": 3e-3, "mm_vision_layer_decay": 0.5, "llm_layer_decay": 0.5}
    more = {**form, **rates, "lora_dropout": 0, "max_steps": 4}
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    train(flags(dirs, small_data, tmp_path / "single", **more, **batch))
    out = tmp_path / "two"
    argv = flags(dirs, small_data, out, **{**options(zero), "save_strategy": "no"}, **more)
    runs.finish(argv, tmp_path / "log", ranks=2)
    assert runs.losses(out) == pytest.approx(runs.losses(tmp_path / "single"), abs=LOSS_ATOL)
    runs.assert_equal_weights(out, tmp_path / "single", atol=WEIGHT_ATOL)
    assert logits(load(out)).isfinite().all()
