"""Training flags: published names and defaults, and errors that name every invalid flag."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llava.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments, use_fused_adamw
from llava.errors import ConfigError

MODEL = {
    "model_name_or_path": "facebook/opt-125m",
    "version": "v0",
    "freeze_backbone": False,
    "tune_mm_mlp_adapter": False,
    "tune_vit_pos_embedding": False,
    "vision_tower": None,
    "mm_vision_select_layer": -1,
    "pretrain_mm_mlp_adapter": None,
    "mm_projector_type": "linear",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True,
    "mm_vision_select_feature": "patch",
    "mm_vision_image_size": None,
    "attn_implementation": "auto",
    "unfreeze_mm_vision_tower": False,
    "unfreeze_mm_vision_layers": 0,
}
DATA = {
    "data_path": None,
    "meta_path": None,
    "lazy_preprocess": False,
    "is_multimodal": False,
    "image_folder": None,
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "on_bad_sample": "error",
    "eval_data_path": None,
    "validation_fraction": 0.0,
    "eval_generations": 4,
}
TRAINING = {
    "cache_dir": None,
    "optim": "adamw_torch",
    "remove_unused_columns": False,
    "freeze_mm_mlp_adapter": False,
    "mm_projector_lr": None,
    "mm_vision_tower_lr": None,
    "mm_vision_layer_decay": None,
    "llm_layer_decay": None,
    "freeze_llm": False,
    "freeze_policy": "default",
    "loss": "cross_entropy",
    "z_loss": 0.0,
    "mpt_attn_impl": "triton",
    "model_max_length": 512,
    "double_quant": True,
    "quant_type": "nf4",
    "bits": 16,
    "lora_enable": False,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_weight_path": "",
    "lora_bias": "none",
    "mm_vision_lora_r": 0,
    "use_dora": False,
    "use_rslora": False,
    "group_by_modality_length": False,
    "plot_loss": True,
    "global_batch_size": 8,
    "loss_group_size": 8,
    "micro_batch_tokens": None,
    "deterministic": False,
    "step_timeout": 1800.0,
    "profile_step_start": None,
    "profile_step_end": None,
    "memory_snapshot": False,
}


def given(tmp_path: Path, *more: str) -> list[str]:
    return ["--output_dir", str(tmp_path), "--use_cpu", "True", "--data_path", "data.json", *more]


def test_the_published_flags_and_defaults_are_frozen(tmp_path: Path) -> None:
    model, data, training = parse_arguments(given(tmp_path))
    assert {f.name: getattr(model, f.name) for f in fields(ModelArguments)} == MODEL
    assert {f.name: getattr(data, f.name) for f in fields(DataArguments)} == {**DATA, "data_path": "data.json"}
    inherited = {f.name for f in fields(transformers.TrainingArguments)}
    assert {f.name for f in fields(TrainingArguments)} - inherited == set(TRAINING) - {"optim", "remove_unused_columns"}
    assert {name: getattr(training, name) for name in TRAINING} == {**TRAINING, "optim": "adamw_torch_fused"}
    assert TrainingArguments.optim == TRAINING["optim"], "the same update"
    assert training.report_to == (["tensorboard"] if importlib.util.find_spec("tensorboard") else [])


def test_all_invalid_flags_are_reported_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(
            given(
                tmp_path,
                *("--mm_vision_select_feature", "cls", "--on_bad_sample", "maybe", "--bits", "3"),
                *("--lora_bias", "some", "--model_max_length", "0", "--tune_mm_mlp_adapter", "True"),
            )
        )
    for flag in ("mm_vision_select_feature", "on_bad_sample", "bits", "lora_bias", "model_max_length", "vision_tower"):
        assert f"--{flag}" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_enable", "True", "--freeze_llm", "True"], ["--freeze_llm", "--lora_enable"]),
        (
            ["--vision_tower", "t", "--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True"],
            ["--tune_mm_mlp_adapter", "--freeze_mm_mlp_adapter"],
        ),
        (
            ["--vision_tower", "t", "--freeze_llm", "True", "--freeze_mm_mlp_adapter", "True"],
            ["--freeze_llm", "--freeze_mm_mlp_adapter"],
        ),
        (["--bits", "4"], ["--bits", "--lora_enable"]),
        (["--bits", "8", "--lora_enable", "True", "--lora_bias", "all"], ["--lora_bias"]),
        (["--lora_enable", "True"], ["--lora_enable", "--vision_tower"]),
        (
            ["--lora_enable", "True", "--vision_tower", "t", "--tune_vit_pos_embedding", "True"],
            ["--tune_vit_pos_embedding", "--lora_enable"],
        ),
        (["--freeze_llm", "True"], ["--freeze_llm", "--vision_tower"]),
        (["--pretrain_mm_mlp_adapter", "x.bin"], ["--pretrain_mm_mlp_adapter", "--vision_tower"]),
        (["--deepspeed", "scripts/zero2.json"], ["--use_cpu", "--deepspeed"]),
        (["--evaluation_strategy", "steps"], ["--eval_data_path"]),
        (["--eval_data_path", "x.json", "--validation_fraction", "0.1"], ["--eval_data_path", "--validation_fraction"]),
        (["--validation_fraction", "1"], ["--validation_fraction"]),
        (["--validation_fraction", "0.1", "--save_strategy", "no"], ["--save_strategy", "--evaluation_strategy"]),
        (["--unfreeze_mm_vision_layers", "2"], ["--unfreeze_mm_vision_tower"]),
        (["--unfreeze_mm_vision_tower", "True"], ["--vision_tower"]),
        (["--global_batch_size", "9"], ["--global_batch_size 9", "--per_device_train_batch_size 8"]),
        (["--global_batch_size", "8", "--loss_group_size", "3"], ["--global_batch_size 8", "--loss_group_size 3"]),
        (["--global_batch_size", "8", "--gradient_accumulation_steps", "2"], ["--gradient_accumulation_steps 2"]),
        (["--loss_group_size", "0"], ["--loss_group_size"]),
        (["--step_timeout", "-1"], ["--step_timeout"]),
        (
            ["--load_best_model_at_end", "True", "--save_strategy", "no"],
            ["--load_best_model_at_end", "--save_strategy"],
        ),
        (["--load_best_model_at_end", "True"], ["--eval_data_path"]),
        (["--remove_unused_columns", "True"], ["--remove_unused_columns"]),
        (["--label_smoothing_factor", "1"], ["--label_smoothing_factor", "below 1"]),
        (["--z_loss", "-1"], ["--z_loss"]),
        (["--meta_path", "mix.json"], ["--data_path", "--meta_path"]),
        (["--fsdp", "full_shard"], ["--fsdp"]),
        (["--torch_compile", "True"], ["--torch_compile", "packed batches"]),
        (["--torch_compile_mode", "default"], ["--torch_compile"]),
        (["--seed", "-1", "--data_seed", "-2"], ["--seed", "--data_seed"]),
        (["--tf32", "True"], ["--tf32"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size"]),
        (["--learning_rate", "-1"], ["--learning_rate"]),
        (["--no_such_flag", "1"], ["--no_such_flag"]),
        (["--mm_patch_merge_type", "flat"], ["--mm_patch_merge_type"]),
        (["--image_aspect_ratio", "anyres"], ["--image_aspect_ratio", "square", "pad", "'anyres'"]),
        (["--image_aspect_ratio", "Pad"], ["--image_aspect_ratio", "'Pad'"]),
        (["--lazy_preprocess", "maybe"], ["--lazy_preprocess", "maybe"]),
        (["--mm_vision_select_feature", "CLS"], ["--mm_vision_select_feature", "cls_patch", "'CLS'"]),
        (["--lr_scheduler_type", "cosin"], ["--lr_scheduler_type", "cosin"]),
        (["--evaluation_strategy", "often"], ["--evaluation_strategy", "often"]),
        (["--save_strategy", "sometimes"], ["--save_strategy", "sometimes"]),
        (["--optim", "adam"], ["adam is not a valid OptimizerNames"]),
        (["--report_to", "json"], ["--report_to", "tensorboard", "json"]),
        (["--hub_model_id", "me/run"], ["--hub_model_id", "--push_to_hub"]),
        (["--push_to_hub", "True", "--hub_model_id", "me/my/run"], ["--hub_model_id", "'me/my/run'"]),
        (["--push_to_hub", "True", "--hub_strategy", "often"], ["often"]),
        (["--hub_token", "hf_1"], ["--hub_token", "HF_TOKEN"]),
        (["--push_to_hub_model_id", "run"], ["--push_to_hub_model_id", "use --hub_model_id"]),
        (["--profile_step_end", "3"], ["--profile_step_end", "--profile_step_start"]),
        (["--profile_step_start", "0"], ["--profile_step_start"]),
        (["--profile_step_start", "4", "--profile_step_end", "3"], ["--profile_step_end", "(4)"]),
        (["--auto_find_batch_size", "True"], ["--auto_find_batch_size", "llava estimate"]),
        (["--ignore_data_skip", "True"], ["--ignore_data_skip"]),
        (["--include_num_input_tokens_seen", "True"], ["--include_num_input_tokens_seen"]),
        (["--split_batches", "True", "--dispatch_batches", "True"], ["--split_batches", "--dispatch_batches"]),
        (["--num_train_epochs", "0"], ["--num_train_epochs"]),
        (["--save_total_limit", "0"], ["--save_total_limit"]),
        (["--save_steps", "0", "--eval_steps", "-1"], ["--save_steps", "--eval_steps"]),
        (["--dataloader_num_workers", "-1"], ["--dataloader_num_workers"]),
        (["--max_grad_norm", "-1"], ["--max_grad_norm"]),
        (["--warmup_ratio", "2"], ["warmup_ratio"]),
        (["--fp16", "True"], ["fp16"]),
        (["--fp16", "True", "--bf16", "True"], ["fp16", "bf16"]),
        (["--gradient_checkpointing_kwargs", "use_reentrant"], ["--gradient_checkpointing_kwargs", "JSON object"]),
        (["--mm_projector_lr", "-1"], ["--mm_projector_lr"]),
        (["--mm_projector_lr", "1e-5"], ["--mm_projector_lr", "--vision_tower"]),
        (
            ["--vision_tower", "t", "--mm_projector_lr", "1e-5", "--freeze_mm_mlp_adapter", "True"],
            ["--mm_projector_lr", "--freeze_mm_mlp_adapter"],
        ),
        (["--mm_vision_tower_lr", "1e-6", "--vision_tower", "t"], ["--mm_vision_tower_lr", "frozen vision tower"]),
        (["--mm_vision_layer_decay", "0.9", "--vision_tower", "t"], ["--mm_vision_layer_decay", "frozen"]),
        (["--mm_vision_layer_decay", "1.1"], ["--mm_vision_layer_decay must be above 0 and at most 1, got 1.1"]),
        (["--llm_layer_decay", "0"], ["--llm_layer_decay"]),
        (
            ["--vision_tower", "t", "--llm_layer_decay", "0.9", "--freeze_llm", "True"],
            ["--llm_layer_decay with --freeze"],
        ),
        (["--mm_vision_lora_r", "8"], ["--mm_vision_lora_r requires --lora_enable True"]),
        (["--mm_vision_lora_r", "-8"], ["--mm_vision_lora_r must be at least 0"]),
        (["--use_dora", "True"], ["--use_dora requires --lora_enable True"]),
        (["--use_rslora", "True"], ["--use_rslora requires --lora_enable True"]),
        (
            ["--use_dora", "True", "--lora_enable", "True", "--bits", "4", "--vision_tower", "t"],
            ["--use_dora", "--bits 4"],
        ),
        (["--bits", "four"], ["--bits"]),
    ],
)
def test_an_invalid_flag_is_named(tmp_path: Path, flags: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(given(tmp_path, *flags))
    assert all(name in str(caught.value) for name in named)


def test_flags_without_effect_log_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parse_arguments(given(tmp_path, "--cache_dir", "x", "--lora_weight_path", "y", "--image_grid_pinpoints", "z"))
    assert [one.getMessage().split()[0] for one in caplog.records if one.levelname == "WARNING"] == [
        *("--cache_dir", "--lora_weight_path", "--image_grid_pinpoints")
    ]


def test_missing_data_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data_path is missing"):
        parse_arguments(["--output_dir", str(tmp_path), "--use_cpu", "True"])


def test_missing_reporter_package_logs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    training = parse_arguments(given(tmp_path, "--report_to", "wandb"))[2]
    assert training.report_to == (["tensorboard"] if importlib.util.find_spec("tensorboard") else [])
    assert "wandb is not installed" in caplog.text


def test_unique_prefixes_are_accepted_as_in_published_scripts(tmp_path: Path) -> None:
    assert parse_arguments(given(tmp_path, "--group_by_mod", "True"))[2].group_by_modality_length


def test_gradient_checkpointing_options_are_a_json_object(tmp_path: Path) -> None:
    more = ("--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}')
    assert parse_arguments(given(tmp_path, *more))[2].gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_only_a_version_on_the_command_line_is_given(tmp_path: Path) -> None:
    for more in ((), ("--version", "v0"), ("--version=v0",), ("--vers", "v0")):
        model = parse_arguments(given(tmp_path, *more))[0]
        assert (model.version, model.version_given) == ("v0", bool(more))


@pytest.mark.parametrize(
    ("more", "step", "group"),
    [
        ({}, 8, 8),
        ({"global_batch_size": 24}, 24, 8),
        ({"gradient_accumulation_steps": 3}, 24, 8),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 3}, 24, 8),
        ({"global_batch_size": 24, "per_device_train_batch_size": 16, "loss_group_size": 6}, 24, 6),
        ({"per_device_train_batch_size": 3, "loss_group_size": 1}, 3, 1),
    ],
)
def test_samples_of_a_step(tmp_path: Path, more: dict[str, int], step: int, group: int) -> None:
    flags = [part for name, value in more.items() for part in (f"--{name}", str(value))]
    args = parse_arguments(given(tmp_path, *flags))[2]
    assert (args.global_batch_size, args.loss_group_size) == (step, group)
    assert args.gradient_accumulation_steps == 1, "libraries see a step as one batch"


@pytest.mark.parametrize(
    ("more", "optimizer"),
    [
        ([], "adamw_torch_fused"),
        (["--optim", "adamw_torch"], "adamw_torch"),
        (["--optim=adamw_torch"], "adamw_torch"),
        (["--optim", "adafactor"], "adafactor"),
        (["--optim", "adamw_torch_fused"], "adamw_torch_fused"),
    ],
)
@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_the_default_optimizer_is_fused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    more: list[str],
    optimizer: str,
) -> None:
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _: torch.device(device)))
    monkeypatch.setattr(TrainingArguments, "process_index", 0)
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    with caplog.at_level("INFO", "llava.arguments"):
        training = parse_arguments(given(tmp_path, *more))[2]
    assert training.optim == optimizer
    assert training.to_dict()["optim"] == optimizer
    assert caplog.text.count("Using --optim adamw_torch_fused;") == (not more)


@pytest.mark.parametrize("other", [{"device": torch.device("mps")}, {"fp16": True}, {"deepspeed_plugin": 1}])
def test_elsewhere_the_default_optimizer_is_unfused(other: dict[str, Any]) -> None:
    settings = {"device": torch.device("cuda"), "fp16": False, "deepspeed_plugin": None, "process_index": 0}
    for given, optimizer in ((settings, "adamw_torch_fused"), (settings | other, "adamw_torch")):
        args: Any = SimpleNamespace(optim="adamw_torch", **given)
        use_fused_adamw(args)
        assert args.optim == optimizer
