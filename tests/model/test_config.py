"""`config.json` in all its spellings: one reader for chat, check, export, merge and training."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig

from llava.arguments import ModelArguments, TrainingArguments
from llava.engine.llama import LlamaRunner, build_model_runner
from llava.errors import CheckpointError, LlavaError
from llava.model import builder, config
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.checkpoint import Kind, inspect
from llava.model.export import check_exportable
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.language_model.llava_mpt import LlavaMptConfig
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig
from llava.model.multimodal_encoder.tower import VisionTower
from llava.train import model_setup
from tests import tiny
from tests.model.test_builder import IDS, PIXELS

Dirs = dict[str, Path]
Edit = dict[str, Any]
DROP: Any = object()


def copy_with(source: Path, directory: Path, settings: Edit) -> Path:
    """A copy of a directory with changed settings; `DROP` deletes a key, None writes null."""
    shutil.copytree(source, directory)
    file = directory / "config.json"
    changed = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not DROP}))
    return directory


def train_base(base: Path, tower: Path, output: Path) -> Any:
    model_args = ModelArguments(model_name_or_path=str(base), vision_tower=str(tower))
    return model_setup.load_base(model_args, TrainingArguments(output_dir=str(output), use_cpu=True))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, images=PIXELS).logits


THETA = 100000.0
LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
SAME_FUNCTION: dict[str, tuple[Edit, Edit]] = {
    "transformers 5": (
        {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}, "rope_theta": DROP, "rope_scaling": DROP},
        {"rope_theta": THETA},
    ),
    "transformers 5, linear": (
        {"rope_parameters": {"rope_theta": THETA, "rope_type": "linear", "factor": 2.0}, "rope_theta": DROP},
        {"rope_theta": THETA, **LINEAR},
    ),
    "transformers 5, dynamic": (
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "dynamic", "factor": 2}, "rope_scaling": DROP},
        DYNAMIC,
    ),
    "by layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": THETA, "rope_type": "default"}}, "rope_theta": DROP},
        {"rope_theta": THETA},
    ),
    "default": ({"rope_scaling": {"rope_type": "default"}}, {}),
    "an integer factor": ({"rope_scaling": {"type": "linear", "factor": 2}}, LINEAR),
    "rope_type": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, LINEAR),
    "both names": ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}, LINEAR),
    "the original length": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 1024}},
        LINEAR,
    ),
    "a factor of 1": ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, {}),
    "longchat": ({"rope_condense_ratio": 2}, LINEAR),
    "longchat, in both spellings": ({"rope_condense_ratio": 2, **LINEAR}, LINEAR),
    "integers as floats": ({"hidden_size": 48.0, "num_hidden_layers": 2.0, "mm_hidden_size": 32.0}, {}),
    "dtype auto": ({"torch_dtype": "auto"}, {}),
    "dtype with its module": ({"torch_dtype": "torch.float32"}, {}),
    "pad token -1": ({"pad_token_id": -1}, {}),
    "an eos list": ({"eos_token_id": [2, 3]}, {}),
    "attention off": ({"use_sliding_window": False, "sliding_window": 64, "layer_types": ["full_attention"] * 2}, {}),
    "a window of the context": ({"sliding_window": 2048}, {}),
    "what a head has": ({"head_dim": 12, "query_pre_attn_scalar": 12, "attention_multiplier": 12**-0.5}, {}),
    "all of them one": ({"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0}, {}),
    "merged with the library's class": (
        {"model_type": "llava", "text_config": {"model_type": "llama"}, "ignore_index": -100, "image_token_index": 9},
        {},
    ),
    "LLaVA 1.5": ({"mm_patch_merge_type": "flat", "mm_projector_lr": 2e-5, "mm_resampler_type": None}, {}),
    "not quantized": ({"quantization_config": None}, {}),
}


@pytest.mark.parametrize("form", SAME_FUNCTION)
def test_a_spelling_loads_as_the_same_function(
    tiny_dirs: Dirs, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For chat, the engine and training alike, without a warning; and what is saved loads elsewhere."""
    given, plain = SAME_FUNCTION[form]
    chat = copy_with(tiny_dirs["chat"], tmp_path / "chat", given)
    with caplog.at_level(logging.WARNING, logger="llava"):
        model = load_pretrained_model(chat, device="cpu")[1]
        trained = train_base(chat, tiny_dirs["tower"], tmp_path / "run")
        examine(chat)
    assert not [record for record in caplog.records if "config.json" in record.message]
    expected = logits(load_pretrained_model(copy_with(tiny_dirs["chat"], tmp_path / "old", plain), device="cpu")[1])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    embeds = model.get_input_embeddings()(torch.tensor([[1, 5, 9, 11, 17, 23]]))
    with torch.inference_mode():
        runner = build_model_runner(model)
        assert isinstance(runner, LlamaRunner)
        last = runner.logits(runner.prefill([embeds[0]], [()])[1])[0]
        wanted = trained.eval().get_model()(inputs_embeds=embeds).last_hidden_state[:, -1]
        torch.testing.assert_close(last, trained.lm_head(wanted)[0], rtol=1e-4, atol=1e-4)
    model.config.save_pretrained(tmp_path / "saved")
    old = LlamaConfig.from_pretrained(tmp_path / "saved")
    assert (old.rope_theta, old.rope_scaling) == (model.config.rope_theta, model.config.rope_scaling)


QUANTIZED = "holds quantized weights .*pass the checkpoint they were made from"
REFUSED: dict[str, tuple[Edit, str]] = {
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}},
        "llama3.*transformers 4.36.2 does not support",
    ),
    "llama3, transformers 5": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}, "transformers_version": "5.2.0",
         "rope_theta": DROP},
        r"llama3.*does not support \(the file was written by transformers 5.2.0",
    ),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn.*does not support"),
    "longrope": ({"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
    "mrope": ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]}}, "mrope"),
    "a factor below 1": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "does not support"),
    "a factor without a kind": ({"rope_scaling": {"factor": 4.0}}, "does not support"),
    "two thetas": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=10000.0 and"),
    "rope as a list": ({"rope_scaling": []}, "must be an object"),
    "half a rotation": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor=0.5, which changes"),
    "MLP biases": ({"mlp_bias": True}, "sets mlp_bias=True, which changes what the model computes"),
    "a sliding window": ({"sliding_window": 128}, "sliding_window=128"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "layers without rotation": ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "Granite": ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
    "Granite's attention": ({"attention_multiplier": 0.0078125}, "attention_multiplier"),
    "MiniCPM": ({"scale_depth": 1.4}, "scale_depth"),
    "Gemma": ({"final_logit_softcapping": 30.0}, "softcapping"),
    "Cohere": ({"logit_scale": 0.0625}, "logit_scale"),
    "wide heads": ({"head_dim": 16}, "head_dim=16"),
    "normed queries": ({"use_qk_norm": True}, "use_qk_norm"),
    "experts": ({"num_local_experts": 8}, "num_local_experts=8"),
    "a multiplier of tomorrow": ({"key_multiplier": 0.5}, "key_multiplier=0.5"),
    "several crops": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
    "merged crops": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
    "not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, QUANTIZED),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, QUANTIZED),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, QUANTIZED),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, QUANTIZED),
    "more rows than weights": (
        {"vocab_size": 400},
        r"do not match the configuration: 2 of a different shape \(lm_head.weight is \(384, 48\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_supported_is_refused_everywhere_alike(tiny_dirs: Dirs, tmp_path: Path, form: str) -> None:
    settings, message = REFUSED[form]
    chat = copy_with(tiny_dirs["chat"], tmp_path / "chat", settings)
    readers: list[Callable[[], object]] = [
        lambda: load_pretrained_model(chat, device="cpu"),
        lambda: examine(chat),
        lambda: train_base(chat, tiny_dirs["tower"], tmp_path / "run"),
    ]
    if form != "more rows than weights":  # an export loads the weights after it has read the configuration
        readers.append(lambda: check_exportable(inspect(chat), "hf-llava"))
    texts = set()
    for read in readers:
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        texts.add(str(caught.value))
    assert len(texts) == 1 and str(chat) in texts.pop()


@pytest.mark.parametrize("form", ["llama3", "fp8", "wide heads", "more rows than weights"])
def test_a_base_is_read_as_a_model_is(tiny_dirs: Dirs, tmp_path: Path, form: str) -> None:
    settings, message = REFUSED[form]
    base = copy_with(tiny_dirs["base"], tmp_path / "base", settings)
    lora = tiny.make_lora(tmp_path / "lora", tiny_dirs["chat"], base)
    readers: list[Callable[[], object]] = [
        lambda: load_pretrained_model(base, device="cpu", text_only=True),
        lambda: load_pretrained_model(lora, base, device="cpu"),
        lambda: examine(base),
        lambda: examine(lora, base),
        lambda: train_base(base, tiny_dirs["tower"], tmp_path / "run"),
    ]
    for read in readers:
        with pytest.raises(CheckpointError, match=f"{message}|was trained with a vocabulary of 384, but"):
            read()


LANGUAGE_KEYS = sorted({*tiny.llama_settings(), "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "dtype",
                        "rms_norm_eps", "attention_bias", "tie_word_embeddings", "torch_dtype", "max_sequence_length",
                        "quantization_config", "head_dim", "mlp_bias", "sliding_window", "transformers_version",
                        "eos_token_id", "image_aspect_ratio", "layer_types"})  # fmt: skip
VALUES = [None, [], {}, -1, 0, 1, 1.5, 48.0, float("inf"), "x", True, {"type": "linear", "factor": 2}, ["a"]]


def outcome(read: Callable[[], object]) -> str:
    """The error of a reader, or nothing if it accepts the directory."""
    try:
        read()
    except LlavaError as error:
        return str(error)
    return ""


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(LANGUAGE_KEYS), st.sampled_from(VALUES), min_size=1, max_size=2)
)
def test_all_readers_agree_on_mutated_configurations(tiny_dirs: Dirs, changes: Edit) -> None:
    """Chat, check and training accept a configuration, or refuse it with the same sentence and never a traceback."""
    with tempfile.TemporaryDirectory() as place:
        chat = copy_with(tiny_dirs["chat"], Path(place) / "chat", changes)
        outcomes = {
            outcome(lambda: load_pretrained_model(chat, device="cpu")),
            outcome(lambda: examine(chat)),
            outcome(lambda: train_base(chat, tiny_dirs["tower"], Path(place) / "run")),
        }
        assert len(outcomes) == 1


PUBLISHED: dict[str, tuple[type[PretrainedConfig], Edit]] = {
    "LLaVA-1.5": (
        LlavaConfig,
        {"freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "image_aspect_ratio": "pad",
         "image_crop_resolution": 224, "image_grid_pinpoints": None, "image_split_resolution": 224, "max_length": 4096,
         "mm_patch_merge_type": "flat", "mm_projector_lr": None, "mm_resampler_type": None, "mm_vision_tower_lr": 2e-5,
         "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "tune_mm_vision_resampler": False,
         "unfreeze_mm_vision_tower": False, "use_mm_proj": True, "vision_tower": "openai/clip-vit-large-patch14"},
    ),
    "InternVL-Chat": (
        LlavaConfig,
        {"_name_or_path": "InternVL-Chat-ViT-6B-Vicuna-7B", "architectures": ["LlavaLlamaForCausalLM"],
         "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "mm_hidden_size": 3200,
         "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
         "mm_vision_select_feature": "patch", "mm_vision_select_layer": -4, "pretraining_tp": 1, "rope_scaling": None,
         "mm_vision_tower": "OpenGVLab/InternViT-6B-224px", "torch_dtype": "bfloat16", "tune_mm_mlp_adapter": False,
         "transformers_version": "4.31.0"},
    ),
    "Vicuna 16k": (
        LlavaConfig,
        {"max_position_embeddings": 4096, "max_sequence_length": 16384, **LINEAR},
    ),
    "SmolLM2": (
        LlavaConfig,
        {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "head_dim": None, "mlp_bias": False,
         "transformers.js_config": {"dtype": {"q4": 1}}},
    ),
    "MPT-7B-Chat": (
        LlavaMptConfig,
        {"attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "triton", "attn_pdrop": 0, "clip_qkv": None,
                         "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "prefix_lm": False,
                         "qk_ln": False, "softmax_scale": None},
         "init_config": {"name": "kaiming_normal_"}, "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0,
         "norm_type": "low_precision_layernorm", "learned_pos_emb": True, "embedding_fraction": 1.0},
    ),
    "CLIP": (
        CLIPVisionConfig,
        {"model_type": "clip_vision_model", "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu",
         "projection_dim": 768, "chunk_size_feed_forward": 0, "vocab_size": 32000, "is_decoder": False},
    ),
    "InternViT V1-5": (
        InternVisionConfig,
        {"auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"}, "drop_path_rate": 0.0,
         "initializer_factor": 0.1, "qk_normalization": True, "use_bfloat16": True, "use_flash_attn": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_pass_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, settings = PUBLISHED[name]
    with caplog.at_level(logging.WARNING, logger="llava"):
        config.read_settings(settings, kind, name)
    assert not caplog.records


def test_golden_configurations_pass_without_a_warning(golden_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in sorted(golden_dir.glob("models/*/config.json")):
        found = inspect(file.parent)
        if found.kind is Kind.TOWER:
            _ = VisionTower(str(file.parent), LlavaConfig(mm_vision_select_layer=-1)).config
        else:
            builder.read_config(found)
    assert not caplog.records


def test_an_unknown_key_is_named_once(tiny_dirs: Dirs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat = copy_with(tiny_dirs["chat"], tmp_path / "chat", {"out_dim": 256, "train_mask_decoder": True})
    with caplog.at_level(logging.WARNING, logger="llava"):
        for _ in range(2):
            load_pretrained_model(chat, device="cpu")
        examine(chat)
    named = [record.message for record in caplog.records if "out_dim" in record.message]
    assert named == [f"config.json of {chat} has unknown keys, which are ignored: out_dim, train_mask_decoder."]


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_type", "layer_norm"), ("num_channels", 4), ("rope", True), ("qk_norm", True), ("use_rms_norm", True)],
)
def test_a_tower_of_another_architecture_is_refused(tiny_dirs: Dirs, tmp_path: Path, key: str, value: Any) -> None:
    tower = copy_with(tiny_dirs["tower"], tmp_path / "tower", {key: value})
    clip = copy_with(tiny.make_clip_tower(tmp_path / "clip"), tmp_path / "other", {key: value})
    for directory in (tower, clip):
        with pytest.raises(LlavaError, match=f"{key}={value!r}"):
            examine(directory)


def test_the_dtype_of_transformers_5_is_read(tiny_dirs: Dirs, tmp_path: Path) -> None:
    chat = copy_with(tiny_dirs["chat"], tmp_path / "chat", {"dtype": "bfloat16", "torch_dtype": DROP})
    assert builder.read_config(inspect(chat)).torch_dtype is torch.bfloat16
    assert inspect(chat).dtype is torch.bfloat16
    assert inspect(tiny_dirs["chat"]).dtype is torch.float32


def test_a_byte_order_mark_is_no_damage(tiny_dirs: Dirs, tmp_path: Path) -> None:
    chat = shutil.copytree(tiny_dirs["chat"], tmp_path / "chat")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (chat / name).write_bytes(b"\xef\xbb\xbf" + (chat / name).read_bytes())
    expected = logits(load_pretrained_model(tiny_dirs["chat"], device="cpu")[1])
    assert torch.equal(logits(load_pretrained_model(chat, device="cpu")[1]), expected)
    train_base(chat, tiny_dirs["tower"], tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"max_sequence_length": 512, "max_position_embeddings": 128}, 128),
        ({"max_sequence_length": 100, "max_position_embeddings": 128}, 100),
        ({"max_position_embeddings": 128}, 128),
        ({"max_sequence_length": 512, "max_position_embeddings": 256, **LINEAR}, 512),
        ({"max_sequence_length": 512, "max_position_embeddings": 128, **DYNAMIC}, 128),
    ],
)  # fmt: skip
def test_there_is_one_context_length(tiny_dirs: Dirs, tmp_path: Path, settings: Edit, length: int) -> None:
    chat = copy_with(tiny_dirs["chat"], tmp_path / "chat", settings)
    _, model, _, loaded = load_pretrained_model(chat, device="cpu")
    fact = dict(examine(chat).facts)["context"]
    assert (loaded, build_model_runner(model).context_length, int(fact.split()[0])) == (length, length, length)


def test_a_long_context_is_computed_with_scaled_positions(tiny_dirs: Dirs, tmp_path: Path) -> None:
    """Beyond `max_position_embeddings`, up to the declared length, as transformers does."""
    settings = {
        "max_sequence_length": 96,
        "max_position_embeddings": 24,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    model: Any = load_pretrained_model(
        copy_with(tiny_dirs["base"], tmp_path / "base", settings), device="cpu", text_only=True
    )[1]
    ids = torch.arange(5, 65).unsqueeze(0)
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
        runner = build_model_runner(model)
        found = runner.logits(runner.prefill([runner.embed(ids[0])], [()])[1])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sampling_settings_of_a_greedy_model_survive_saving(tiny_dirs: Dirs, tmp_path: Path) -> None:
    """As published with Vicuna; and null, as transformers 5 writes it, is the default."""
    chat = shutil.copytree(tiny_dirs["chat"], tmp_path / "chat")
    given = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 3], "top_k": None, "do_sample": None}
    (chat / "generation_config.json").write_text(json.dumps(given))
    model = load_pretrained_model(chat, device="cpu")[1]
    assert model.generation_config.do_sample is False and model.generation_config.top_k == 50
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: saved[key] for key in ("temperature", "top_p", "eos_token_id", "do_sample")} == {
        "temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 3], "do_sample": True,
    }  # fmt: skip
    assert model.generation_config.do_sample is False


def test_a_pad_token_that_training_added_is_not_in_the_base(tiny_dirs: Dirs, tmp_path: Path) -> None:
    projector = tiny.make_projector_only(tmp_path / "projector", tiny_dirs["chat"])
    settings = json.loads((projector / "config.json").read_text())
    (projector / "config.json").write_text(json.dumps({**settings, "vocab_size": 385, "pad_token_id": 384}))
    examine(projector, tiny_dirs["base"])
    assert load_pretrained_model(projector, tiny_dirs["base"], device="cpu")[1].config.vocab_size == 384


def test_the_queries_of_a_tower_rotate_as_configured() -> None:
    from llava.model.multimodal_encoder.internvl_14b import TOWER
    from tests.model.test_other_towers import INTERNVL_14B, QLLAMA

    built = TOWER.build(TOWER.config({**INTERNVL_14B, "qllama_config": {**QLLAMA, "rope_theta": 500.0}}), 3)
    assert {m.base for m in built.modules() if type(m).__name__ == "LlamaRotaryEmbedding"} == {500.0}
    with pytest.raises(LlavaError, match="rope_scaling"):
        TOWER.config({**INTERNVL_14B, "qllama_config": {**QLLAMA, **LINEAR}})
