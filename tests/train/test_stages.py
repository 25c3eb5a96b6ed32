"""Both stages in one process: trained parameters, saved files, metadata and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llava.arguments import ModelArguments, TrainingArguments
from llava.errors import CheckpointError, ConfigError, DataError, LlavaError, TemplateError, TrainingError
from llava.model.builder import load_pretrained_model
from llava.train import model_setup
from llava.train.train import main, refuse_unsupported, train
from tests import tiny
from tests.model.test_chat_template import holds_template
from tests.train import runs

Dirs = dict[str, Path]


def build_model(dirs: Dirs, tmp_path: Path, **given: Any) -> tuple[Any, ModelArguments, TrainingArguments]:
    """A tiny model with vision modules, before the freeze policy is applied."""
    model_args = ModelArguments(
        model_name_or_path=str(dirs["base"]),
        vision_tower=str(dirs["tower"]),
        mm_vision_image_size=56,
        mm_vision_select_layer=-4,
        mm_projector_type="mlp2x_gelu",
        **{k: v for k, v in given.items() if hasattr(ModelArguments, k)},
    )
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **{k: v for k, v in given.items() if not hasattr(ModelArguments, k)}
    )
    model = model_setup.load_base(model_args, args)
    model.get_model().initialize_vision_modules(model_args)
    return model, model_args, args


def trained_parts(model: torch.nn.Module) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tower = {name for name in names if "vision_tower" in name}
    if tower:
        assert tower == {"model.vision_tower.vision_tower.embeddings.position_embedding"}
    return {
        "tower" if "vision_tower" in n else "projector" if "mm_projector" in n else "head" if "lm_head" in n else "core"
        for n in names
    }


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({}, {"core", "head", "projector"}),
        ({"tune_mm_mlp_adapter": True}, {"projector"}),
        ({"freeze_llm": True}, {"projector"}),
        ({"freeze_mm_mlp_adapter": True}, {"core", "head"}),
        ({"freeze_backbone": True}, {"head", "projector"}),
        ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, {"head"}),
        ({"tune_vit_pos_embedding": True}, {"core", "head", "projector", "tower"}),
        ({"tune_vit_pos_embedding": True, "tune_mm_mlp_adapter": True}, {"projector", "tower"}),
    ],
)
def test_the_default_freeze_policy(tiny_dirs: Dirs, tmp_path: Path, given: dict[str, bool], trained: set[str]) -> None:
    model, model_args, args = build_model(tiny_dirs, tmp_path, **given)
    model_setup.default_freeze_policy(model, model_args, args)
    assert trained_parts(model) == trained


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing would be trained"):
        model_setup.count_parameters(torch.nn.Linear(2, 2).requires_grad_(False))


def test_several_gpus_in_one_process_are_refused() -> None:
    args: Any = SimpleNamespace(bits=16, n_gpu=8, deepspeed=None)
    with pytest.raises(ConfigError, match=r"sees 8 GPUs.*--nproc_per_node 8"):
        refuse_unsupported(args)


def test_weights_that_do_not_fit_their_configuration_are_refused(tiny_dirs: Dirs, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_dirs["base"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"do not match the configuration: 9 missing \(model.layers.2"):
        build_model({**tiny_dirs, "base": base}, tmp_path)


def test_tuning_positions_needs_an_internvit_tower(tiny_dirs: Dirs, tmp_path: Path) -> None:
    clip = tiny.make_clip_tower(tmp_path / "clip-vit")
    model, model_args, args = build_model({**tiny_dirs, "tower": clip}, tmp_path, tune_vit_pos_embedding=True)
    with pytest.raises(ConfigError, match="needs an InternViT tower"):
        model_setup.default_freeze_policy(model, model_args, args)


def test_masters_are_float32_and_frozen_weights_16_bit(tiny_dirs: Dirs, tmp_path: Path) -> None:
    model, model_args, args = build_model(tiny_dirs, tmp_path, tune_mm_mlp_adapter=True, bf16=True)
    model_setup.default_freeze_policy(model, model_args, args)
    model_setup.set_precision(model, torch.bfloat16, deepspeed=False)
    for name, parameter in model.named_parameters():
        assert parameter.dtype is (torch.float32 if "mm_projector" in name else torch.bfloat16), name


def test_stage_one_then_stage_two_then_load(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(runs.flags(tiny_dirs, small_data, first, 1, plot_loss=True))
    files = {path.name for path in first.iterdir()}
    projectors = {"mm_projector.bin", "mm_projector.safetensors"}
    assert files == projectors | {"README.md", "config.json", "trainer_state.json", "run.json", "log.jsonl", "loss.png"}
    assert set(runs.tensors(first)) == {f"model.mm_projector.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")}

    adapter = first / "mm_projector.bin"
    train(runs.flags(tiny_dirs, small_data, second, 2, pretrain_mm_mlp_adapter=adapter, group_by_modality_length=True))
    files = {path.name for path in second.iterdir()}
    standard = {"config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"}
    standard |= {"tokenizer.model", "tokenizer_config.json", "trainer_state.json", "training_args.bin"}
    assert files == standard | {"README.md", "run.json", "log.jsonl"}
    assert holds_template(second, "v1")
    assert runs.losses(second)[-1] < runs.losses(first)[0]
    for directory, version in ((first, "plain"), (second, "v1")):
        config = json.loads((directory / "config.json").read_text())
        assert config["conv_template"] == version and config["use_cache"] is True
        assert config["mm_vision_image_size"] == 56

    _, model, processor, _ = load_pretrained_model(second, device="cpu")
    assert processor.crop_size["height"] == 56
    saved = runs.tensors(second)
    assert torch.equal(model.state_dict()["model.mm_projector.2.weight"], saved["model.mm_projector.2.weight"])
    _, base_model, _, _ = load_pretrained_model(first, tiny_dirs["base"], device="cpu")
    assert torch.equal(base_model.get_model().mm_projector[0].bias, runs.tensors(first)["model.mm_projector.0.bias"])


def test_run_json_and_log_describe_the_run(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 2, gradient_accumulation_steps=2, seed=7, max_steps=3))
    record = json.loads((out / "run.json").read_text())
    assert record["global_batch"] == 8 and record["seed"] == 7 and record["world_size"] == 1 and record["steps"] == 3
    assert record["samples"] == 32 and record["template"] == "v1" and record["resumed_from"] is None
    assert record["loss_group"] == 4 and record["arguments"]["training"]["global_batch_size"] == 8
    assert record["arguments"]["model"]["vision_tower"] == str(tiny_dirs["tower"])
    assert record["versions"]["transformers"] == "4.36.2"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(line["supervised_tokens"] > 8 and line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    assert (
        "Each step takes 8 of 32 samples, in loss groups of 4" in caplog.text and "clipped at norm 1.0" in caplog.text
    )


def test_fine_tuning_a_chat_checkpoint_keeps_its_projector(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 2, model_name_or_path=tiny_dirs["chat"], learning_rate=0, max_steps=1))
    after, before = runs.tensors(out), runs.tensors(tiny_dirs["chat"])
    assert all(torch.equal(after[name], before[name]) for name in before)
    more = {"vision_tower": None, "model_name_or_path": tiny_dirs["chat"]}
    with pytest.raises(ConfigError, match="--vision_tower"):
        train(runs.flags(tiny_dirs, small_data, tmp_path / "blind", 2, **more))
    assert "was trained with" not in caplog.text
    changed = {"model_name_or_path": tiny_dirs["chat"], "mm_projector_type": "linear", "max_steps": 1}
    with pytest.raises(ConfigError, match=r"\(mlp2x_gelu\) does not fit --mm_projector_type linear"):
        train(runs.flags(tiny_dirs, small_data, tmp_path / "new", 2, **changed))
    train(runs.flags(tiny_dirs, small_data, tmp_path / "new", 1, **changed, mm_vision_select_layer=-2))  # learns it
    train(
        runs.flags(
            tiny_dirs,
            small_data,
            tmp_path / "new2",
            2,
            **{**changed, "mm_projector_type": "mlp2x_gelu"},
            mm_vision_select_layer=-2,
        )
    )
    assert "was trained with --mm_vision_select_layer -4; this run has -2." in caplog.text


def test_a_chat_checkpoint_is_continued_with_its_template(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"model_name_or_path": tiny_dirs["chat"], "max_steps": 1}
    for version, template, line in (
        (None, "v1", f"Using template v1, with which {tiny_dirs['chat']} was trained; pass --version to change it."),
        ("vicuna_v1", "vicuna_v1", None),
        ("v0.5", "v0", f"{tiny_dirs['chat']} was trained with template v1; using --version v0."),
    ):
        caplog.clear()
        out = tmp_path / str(version)
        train(runs.flags(tiny_dirs, small_data, out, 2, **more, version=version))
        assert json.loads((out / "config.json").read_text())["conv_template"] == template
        lines = [message for message in caplog.messages if "was trained" in message]
        assert lines == ([line] if line else [])
    caplog.clear()
    unnamed = shutil.copytree(tiny_dirs["chat"], tmp_path / "unnamed")
    config = json.loads((unnamed / "config.json").read_text())
    del config["conv_template"]
    (unnamed / "config.json").write_text(json.dumps(config))
    more["model_name_or_path"] = unnamed
    train(runs.flags(tiny_dirs, small_data, tmp_path / "v0", 2, **more, version=None))
    assert "unnamed names no known template; using --version v0, the default." in caplog.text
    train(runs.flags(tiny_dirs, small_data, tmp_path / "base", 2, max_steps=1))
    assert caplog.text.count("template") == 1


def test_stage_two_without_a_projector_is_one_line(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(runs.flags(tiny_dirs, small_data, tmp_path / "first", 1, max_steps=1))
    for out, more in (
        ("second", {"pretrain_mm_mlp_adapter": tmp_path / "first" / "mm_projector.bin"}),
        ("chat", {"model_name_or_path": tiny_dirs["chat"]}),
    ):
        train(runs.flags(tiny_dirs, small_data, tmp_path / out, 2, max_steps=1, **more))
    assert "starts untrained" not in caplog.text
    train(runs.flags(tiny_dirs, small_data, tmp_path / "plain", 2, max_steps=1))
    assert caplog.text.count(f"The projector starts untrained, because {tiny_dirs['base']} has none") == 1


def test_records_beyond_the_context_are_counted_with_an_example(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = json.loads((small_data / "finetune.json").read_text())
    records[7]["conversations"][0]["value"] += " and why" * 200  # the answer is lost
    records[9]["conversations"][1]["value"] += " indeed" * 200
    (tmp_path / "data.json").write_text(json.dumps(records))
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 2, data_path=tmp_path / "data.json"))
    start = f"of the first 32 records of {tmp_path / 'data.json'}"
    assert f"2 {start} are truncated to --model_max_length 256, the first is 7." in caplog.messages
    assert f"1 {start} have no answer left, the first is 7." in caplog.messages
    end = "Records: 0 bad and replaced, 2 truncated to --model_max_length 256, 1 without a token to learn."
    assert end in caplog.messages
    assert json.loads((out / "run.json").read_text())["data"] == {"bad": 0, "truncated": 2, "unsupervised": 1}


def test_text_only_training_adds_a_pad_token(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    texts = [r for r in json.loads((small_data / "finetune.json").read_text()) if "image" not in r]
    (tmp_path / "text.json").write_text(json.dumps(texts))
    more = {"vision_tower": None, "version": "v0", "data_path": tmp_path / "text.json"}
    train(runs.flags(tiny_dirs, small_data, out, 2, **more))
    config = json.loads((out / "config.json").read_text())
    rows = runs.tensors(out)["model.embed_tokens.weight"]
    assert config["conv_template"] == "v0" and config["pad_token_id"] == len(rows) - 1
    assert len(rows) == len(runs.tensors(tiny_dirs["base"])["model.embed_tokens.weight"]) + 1
    assert not any("mm_projector" in name for name in runs.tensors(out))


def test_freeze_llm_saves_everything_and_changes_the_projector_only(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 2, freeze_llm=True, max_steps=2))
    after, before = runs.tensors(out), runs.tensors(tiny_dirs["base"])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any("vision_tower" in name for name in after) and any("mm_projector" in name for name in after)


def test_tuned_positions_are_trained_and_saved(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 1, tune_vit_pos_embedding=True, max_steps=2))
    table = runs.tensors(out)["model.vision_tower.vision_tower.embeddings.position_embedding"]
    assert not torch.equal(table, runs.tensors(tiny_dirs["tower"])["embeddings.position_embedding"])


def test_the_tower_is_trained_in_full_or_its_last_layers(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    model, model_args, args = build_model(tiny_dirs, tmp_path, unfreeze_mm_vision_tower=True)
    model_setup.default_freeze_policy(model, model_args, args)
    assert all(parameter.requires_grad for parameter in model.get_vision_tower().parameters())
    model_args.unfreeze_mm_vision_layers = 4
    with pytest.raises(ConfigError, match=r"must be at most 3, the number of layers that .* runs, got 4"):
        model_setup.default_freeze_policy(model, model_args, args)

    out = tmp_path / "run"
    more = {"unfreeze_mm_vision_tower": True, "unfreeze_mm_vision_layers": 1, "max_steps": 2}
    train(runs.flags(tiny_dirs, small_data, out, 2, **more, gradient_checkpointing=True))
    prefix = "model.vision_tower.vision_tower."
    before = runs.tensors(tiny_dirs["tower"])
    after = {name.removeprefix(prefix): t for name, t in runs.tensors(out).items() if name.startswith(prefix)}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.startswith("encoder.layers.2.") for name in changed)
    loaded = load_pretrained_model(out, device="cpu")[1].get_vision_tower().vision_tower.state_dict()
    assert all(torch.equal(loaded[name], after[name]) for name in changed)


def test_deterministic_runs_are_equal(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    try:
        for name in "ab":
            train(runs.flags(tiny_dirs, small_data, tmp_path / name, 2, deterministic=True, max_steps=2))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    runs.assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_start_and_end_tokens_are_trained_with_the_projector(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(runs.flags(tiny_dirs, small_data, out, 1, version="v1", mm_use_im_start_end=True, max_steps=2))
    rows = runs.tensors(out)["model.embed_tokens.weight"]
    before = runs.tensors(tiny_dirs["base"])["model.embed_tokens.weight"]
    assert len(rows) == len(before) + 2
    assert torch.equal(rows[:-2], before) and not torch.equal(rows[-1], rows[-2])


def test_bfloat16_on_the_cpu_follows_float32_and_is_saved_in_16_bit(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    seen: set[torch.dtype] = set()
    linear = torch.nn.functional.linear

    def watch(*args: Any) -> torch.Tensor:
        out: torch.Tensor = linear(*args)
        if not out.is_meta:  # from counting the tokens of an image
            seen.add(out.dtype)
        return out

    torch.nn.functional.linear = watch
    try:
        train(runs.flags(tiny_dirs, small_data, tmp_path / "bf16", 2, bf16=True))
    finally:
        torch.nn.functional.linear = linear
    assert seen == {torch.bfloat16}
    train(runs.flags(tiny_dirs, small_data, tmp_path / "fp32", 2))
    assert runs.losses(tmp_path / "bf16") == pytest.approx(runs.losses(tmp_path / "fp32"), abs=0.03)
    assert {t.dtype for t in runs.tensors(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert {t.dtype for t in runs.tensors(tmp_path / "fp32").values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    for stage in (1, 2):
        plain, saving = tmp_path / f"plain{stage}", tmp_path / f"saving{stage}"
        train(runs.flags(tiny_dirs, small_data, plain, stage, max_steps=3))
        train(runs.flags(tiny_dirs, small_data, saving, stage, max_steps=3, gradient_checkpointing=True))
        assert runs.losses(saving) == runs.losses(plain)
        runs.assert_equal_weights(saving, plain, atol=1e-6)


def test_projector_checkpoints_are_small_and_rotated(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    argv = runs.flags(tiny_dirs, small_data, out, 1, save_strategy="steps", save_steps=2, save_total_limit=2)
    train(argv)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    newest = out / "checkpoint-8"
    names = {path.name for path in newest.iterdir()}
    assert names == {
        *("config.json", "mm_projector.bin", "mm_projector.safetensors"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    }
    runs.assert_equal_weights(newest, out)
    before = runs.tensors(out)
    train([*argv, "--seed", "43"])
    assert "Resuming with other flags: --seed 43 (was 42); " in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(out).items())
    with pytest.raises(CheckpointError, match="with another model: model.mm_projector.4.bias is missing"):
        train([*argv, "--mm_projector_type", "mlp3x_gelu"])


def test_a_damaged_checkpoint_is_skipped_and_the_result_is_the_same(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    argv = runs.flags(tiny_dirs, small_data, out, 2, save_strategy="steps", save_steps=3)
    train(argv)
    (out / "checkpoint-6" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    before = runs.tensors(out)
    train(argv)
    assert "checkpoint-6: its weights cannot be read" in caplog.text
    assert f"Resuming from {out / 'checkpoint-3'}" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(out).items())


def test_resume_is_exact_when_accumulation_does_not_divide_an_epoch(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    """11 batches per epoch, two per step: the last is a step of its own."""
    out = tmp_path / "run"
    more = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    argv = runs.flags(tiny_dirs, small_data, out, 2, save_strategy="steps", save_steps=7, **more)
    train(argv)
    before, losses = runs.tensors(out), runs.losses(out)
    assert len(losses) == 12
    train(argv)
    assert runs.losses(out) == losses
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(out).items())


def test_equal_seeds_make_equal_runs_and_others_do_not(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(runs.flags(tiny_dirs, small_data, tmp_path / name, 1, seed=seed, max_steps=2))
    runs.assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert runs.losses(tmp_path / "a") != runs.losses(tmp_path / "c")


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_samples(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.data.dataset import LazySupervisedDataset

    load = LazySupervisedDataset.__getitem__

    def poisoned(self: LazySupervisedDataset, index: int) -> dict[str, torch.Tensor]:
        item = load(self, index)
        return {**item, "image": item["image"] * float("nan")} if index == 13 else item

    monkeypatch.setattr(LazySupervisedDataset, "__getitem__", poisoned)
    with pytest.raises(TrainingError, match=r"loss is nan at step \d+, rank 0, samples \[.*\b13\b.*\]") as caught:
        train(runs.flags(tiny_dirs, small_data, tmp_path / "run", 1))
    named = str(caught.value).split("samples [")[1].split("]")[0].split(",")
    assert len(named) == 4
    assert not (tmp_path / "run" / "mm_projector.bin").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match="gradient norm is inf at step 1"):
        train(runs.flags(tiny_dirs, small_data, tmp_path / "run", 1))


def test_batches_without_supervision_are_counted_and_give_no_nan(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.data.dataset import LazySupervisedDataset

    load = LazySupervisedDataset.__getitem__

    def masked(self: LazySupervisedDataset, index: int) -> dict[str, torch.Tensor]:
        item = load(self, index)
        return {**item, "labels": torch.full_like(item["labels"], -100)}

    monkeypatch.setattr(LazySupervisedDataset, "__getitem__", masked)
    train(runs.flags(tiny_dirs, small_data, tmp_path / "run", 1, max_steps=2))
    assert [(e["loss"], e["supervised_tokens"], e["unsupervised_groups"]) for e in runs.history(tmp_path / "run")] == [
        (0.0, 0, 1),
        (0.0, 0, 1),
    ]


def broken(data: Path, root: Path, fault: str) -> Path:
    """A copy of the stage-1 data with one fault in record 5."""
    records = json.loads((data / "pretrain.json").read_text())
    if fault == "missing image":
        records[5]["image"] = "nowhere.png"
    elif fault == "two placeholders":
        records[5]["image"] = ["0.png", "1.png"]
    elif fault == "no placeholder":
        records[5]["conversations"][0]["value"] = "no image here"
    elif fault == "unknown role":
        records[5]["conversations"][0]["from"] = "robot"
    elif fault == "truncated image":
        path = root / "short.png"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
        records[5]["image"] = str(path)
    (root / "data.json").write_text(json.dumps(records))
    return root / "data.json"


@pytest.mark.parametrize(
    "fault", ["missing image", "two placeholders", "no placeholder", "unknown role", "truncated image"]
)
def test_a_bad_record_ends_the_run_by_name_or_is_skipped_and_counted(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, fault: str
) -> None:
    path = broken(small_data, tmp_path, fault)
    with pytest.raises(DataError, match="record 5"):
        train(runs.flags(tiny_dirs, small_data, tmp_path / "strict", 1, data_path=path))
    train(runs.flags(tiny_dirs, small_data, tmp_path / "skip", 1, data_path=path, on_bad_sample="skip"))
    assert json.loads((tmp_path / "skip" / "run.json").read_text())["data"]["bad"] == 1


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"version": "vicuna"}, TemplateError, "vicuna_v1"),
        ({"mm_projector_type": "mlp2x"}, ConfigError, "Unknown mm_projector_type 'mlp2x'; use one of"),
        ({"image_aspect_ratio": "anyres"}, ConfigError, "--image_aspect_ratio must be square or pad, got 'anyres'"),
        ({"version": "Hermes-2"}, TemplateError, "templates that fit: "),
        ({"bits": 4}, ConfigError, "--lora_enable"),
        ({"model_name_or_path": "tower"}, LlavaError, "a vision tower"),
        ({"vision_tower": "nowhere"}, LlavaError, "nowhere"),
        ({"pretrain_mm_mlp_adapter": "nowhere.bin"}, LlavaError, "nowhere.bin"),
        ({"resume_from_checkpoint": "nowhere"}, LlavaError, "--resume_from_checkpoint"),
        ({"attn_implementation": "flash_attention_2"}, ConfigError, "flash"),
        ({"data_path": "nowhere.json"}, DataError, "nowhere.json"),
    ],
)
def test_errors_before_the_first_step_are_one_sentence(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, more: dict[str, Any], error: type[LlavaError], message: str
) -> None:
    more = {key: tiny_dirs.get(value, value) if key == "model_name_or_path" else value for key, value in more.items()}
    with pytest.raises(error, match=message) as caught:
        train(runs.flags(tiny_dirs, small_data, tmp_path / "run", 2, **more))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_empty_validation_file_and_an_output_file_are_one_sentence(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.json").write_text("[]")
    more = {"eval_data_path": tmp_path / "empty.json", "evaluation_strategy": "epoch"}
    with pytest.raises(DataError, match=r"empty.json holds an array without records"):
        train(runs.flags(tiny_dirs, small_data, tmp_path / "run", 1, **more))
    with pytest.raises(ConfigError, match=r"Cannot write .*empty.json"):
        train(runs.flags(tiny_dirs, small_data, tmp_path / "empty.json", 1))


def test_text_only_data_grouped_by_modality_and_other_checkpointing(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path
) -> None:
    """Text-only records of a multimodal run; `use_reentrant` is a choice of the caller."""
    texts = [r for r in json.loads((small_data / "finetune.json").read_text()) if "image" not in r]
    (tmp_path / "text.json").write_text(json.dumps(texts))
    more = {"group_by_modality_length": True, "data_path": tmp_path / "text.json", "gradient_checkpointing": True}
    for name, reentrant in (("a", "true"), ("b", "false")):
        kwargs = f'{{"use_reentrant": {reentrant}}}'
        train(runs.flags(tiny_dirs, small_data, tmp_path / name, 2, **more, gradient_checkpointing_kwargs=kwargs))
    assert len(runs.losses(tmp_path / "a")) == 2
    runs.assert_equal_weights(tmp_path / "a", tmp_path / "b", atol=1e-6)


def test_code_in_the_pretrained_projector_is_refused(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("owned",))

    torch.save({"model.mm_projector.0.weight": Attack()}, tmp_path / "mm_projector.bin")
    with pytest.raises(LlavaError, match="run code"):
        train(
            runs.flags(
                tiny_dirs, small_data, tmp_path / "run", 2, pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin"
            )
        )


def test_main_prints_a_one_line_error(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(runs.flags(tiny_dirs, small_data, tmp_path / "run", 2, bits=3)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: --bits must be 4, 8 or 16, got 3.")
