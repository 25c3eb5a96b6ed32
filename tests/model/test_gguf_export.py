"""Export to GGUF, read back with `gguf.GGUFReader`: metadata, tokenizer, weights; and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava import cli
from llava.conversation import conv_templates
from llava.errors import CheckpointError, ConfigError, DependencyError
from llava.model.chat_template import jinja_template
from llava.model.checkpoint import iter_tensors
from llava.model.gguf_export import export
from llava.model.saving import WeightSource
from playground.convert_smollm2 import gguf_to_hf_name, read_config, read_tokenizer, read_weights
from tests import tiny
from tests.model.test_builder import edit_config

TYPES = gguf.GGMLQuantizationType
CLIP_NAMES = {
    "v.class_embd": "vision_model.embeddings.class_embedding",
    "v.patch_embd.weight": "vision_model.embeddings.patch_embedding.weight",
    "v.position_embd.weight": "vision_model.embeddings.position_embedding.weight",
    "v.pre_ln.weight": "vision_model.pre_layrnorm.weight",
    "v.blk.2.attn_q.weight": "vision_model.encoder.layers.2.self_attn.q_proj.weight",
    "v.blk.0.attn_out.bias": "vision_model.encoder.layers.0.self_attn.out_proj.bias",
    "v.blk.1.ln2.weight": "vision_model.encoder.layers.1.layer_norm2.weight",
    "v.blk.2.ffn_up.weight": "vision_model.encoder.layers.2.mlp.fc1.weight",
    "v.blk.2.ffn_down.bias": "vision_model.encoder.layers.2.mlp.fc2.bias",
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_clip_tower(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def chat(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("chats") / "chat", clip)


def make(directory: Path, tower: Path, **overrides: Any) -> Path:
    return tiny.make_chat(directory, tower, **{"mm_vision_select_layer": -2, **overrides})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def test_a_chat_model(chat: Path, clip: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = ["export", "--format", "gguf", "--model-path", str(chat), "--output", str(out), "--outtype", "f32"]
    assert cli.main(command) == 0
    assert f"-m {out}/model-f32.gguf --mmproj {out}/mmproj-f32.gguf --jinja." in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["mmproj-f32.gguf", "model-f32.gguf"]
    fields, tensors = read(out / "model-f32.gguf")
    source = load_file(chat / "model.safetensors")
    kept = {name: value for name, value in source.items() if "mm_projector" not in name}
    assert {gguf_to_hf_name(name) if name != "output.weight" else "lm_head.weight" for name in tensors} == kept.keys()
    config = read_config(gguf.GGUFReader(out / "model-f32.gguf").fields)
    layers = [tensor for name, tensor in tensors.items() if name != "output.weight"]
    assert all(torch.equal(value, kept[name].bfloat16()) for name, value in read_weights(layers, config))
    assert not torch.equal(values(tensors["blk.0.attn_q.weight"]), kept["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(values(tensors["output.weight"]), kept["lm_head.weight"])
    expected = {"block_count": 2, "embedding_length": 48, "feed_forward_length": 96, "attention.head_count": 4,
                "attention.head_count_kv": 2, "rope.dimension_count": 12, "context_length": 2048, "vocab_size": 384,
                "rope.freq_base": 10000.0}  # fmt: skip
    assert {name: fields[f"llama.{name}"] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.chat_template"] == jinja_template(conv_templates["v1"])

    fields, tensors = read(out / "mmproj-f32.gguf")
    tower = load_file(clip / "model.safetensors")
    assert all(torch.equal(values(tensors[name]), tower[other]) for name, other in CLIP_NAMES.items())
    assert len(tensors) == 5 + 3 * 16 + 4 and not any(".blk.3." in name or "post_ln" in name for name in tensors)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(values(tensors[f"mm.{name}"]), source[f"model.mm_projector.{name}"])
    expected = {"image_size": 56, "patch_size": 14, "embedding_length": 32, "feed_forward_length": 64,
                "block_count": 3, "feature_layer": [3], "attention.head_count": 2, "projection_dim": 48}  # fmt: skip
    assert {name: fields[f"clip.vision.{name}"] for name in expected} == expected
    assert (fields["clip.projector_type"], fields["clip.use_gelu"]) == ("mlp", False)
    assert (fields["clip.has_vision_encoder"], fields["clip.has_llava_projector"]) == (True, True)
    assert fields["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_the_sentencepiece_tokenizer(chat: Path, tmp_path: Path) -> None:
    """With an added token, more rows than entries, and a second token that ends answers."""
    grown = shutil.copytree(chat, tmp_path / "grown")
    weights = load_file(grown / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(3, 48)])
    save_file(weights, grown / "model.safetensors", metadata={"format": "pt"})
    edit_config(grown, vocab_size=387, mm_use_im_patch_token=True)
    (grown / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    files, stop = export(grown, tmp_path / "out", conv_mode="v0", text_only=True)
    assert [file.name for file in files] == ["model-f16.gguf"] and stop == "###"
    fields, tensors = read(files[0])
    assert tensors["token_embd.weight"].data.shape == (387, 48)
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    sp = tiny.make_tokenizer(tmp_path / "tokenizer").sp_model
    assert tokens == [*(sp.id_to_piece(index) for index in range(384)), "<im_patch>", "[PAD385]", "[PAD386]"]
    assert scores[:384] == [sp.get_score(index) for index in range(384)] and scores[384:] == [-1000.0] * 3
    assert (kinds[:4], kinds[260], kinds[384:]) == ([2, 3, 3, 6], 1, [3, 5, 5])
    special = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "unknown")}
    assert special == {"bos": 1, "eos": 2, "eot": 5, "unknown": 0}
    names = ("model", "add_bos_token", "add_eos_token", "add_space_prefix")
    assert [fields[f"tokenizer.ggml.{name}"] for name in names] == ["llama", True, False, True]
    assert fields["tokenizer.chat_template"] == jinja_template(conv_templates["v0"])


@pytest.mark.parametrize(
    ("outtype", "matrix", "odd", "kernel"),
    [
        ("f16", TYPES.F16, TYPES.F16, TYPES.F16),
        ("bf16", TYPES.BF16, TYPES.BF16, TYPES.F32),
        ("q8_0", TYPES.Q8_0, TYPES.F16, TYPES.F32),
    ],
)
def test_types(chat: Path, tmp_path: Path, outtype: str, matrix: Any, odd: Any, kernel: Any) -> None:
    export(chat, tmp_path / "out", outtype=outtype)
    fields, tensors = read(tmp_path / "out" / f"model-{outtype}.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"]
    source = load_file(chat / "model.safetensors")
    wanted = {"ffn_down": (matrix, "mlp.down_proj"), "ffn_up": (odd, "mlp.up_proj"),
              "attn_norm": (TYPES.F32, "input_layernorm")}  # fmt: skip
    for name, (kind, other) in wanted.items():
        found = tensors[f"blk.1.{name}.weight"]
        assert found.tensor_type == kind
        wanted_values = source[f"model.layers.1.{other}.weight"]
        error = float((values(found) - wanted_values).abs().max() / wanted_values.abs().max())
        assert error <= {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[outtype]
    _, tensors = read(tmp_path / "out" / f"mmproj-{outtype}.gguf")
    assert tensors["v.patch_embd.weight"].tensor_type == kernel
    assert tensors["v.position_embd.weight"].tensor_type == TYPES.F32
    assert tensors["v.blk.0.ffn_down.weight"].tensor_type == matrix


def make_byte_level(directory: Path) -> Path:
    """A tied language model with SmolLM2's kind of tokenizer and biases in its attention."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(tiny.CORPUS.splitlines() * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], unk_token=special[0],
        chat_template="{{ messages[0]['content'] }}",
    )  # fmt: skip
    fast.save_pretrained(directory)
    settings = tiny.llama_settings(vocab_size=320, tie_word_embeddings=True, attention_bias=True, rope_theta=5e4)
    settings["rope_scaling"] = {"type": "linear", "factor": 4.0}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.arange(len(parameter)))
    model.save_pretrained(directory)
    return directory


def test_a_language_model_with_a_byte_level_tokenizer(tmp_path: Path) -> None:
    base = make_byte_level(tmp_path / "base")
    files, stop = export(base, tmp_path / "out", outtype="f32")
    assert [file.name for file in files] == ["model-f32.gguf"] and stop is None
    fields, tensors = read(files[0])
    assert "output.weight" not in tensors
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    scaling = {name: fields[f"llama.rope.scaling.{name}"] for name in ("type", "factor", "original_context_length")}
    assert scaling == {"type": "linear", "factor": 4.0, "original_context_length": 2048}
    assert (fields["llama.context_length"], fields["llama.rope.freq_base"]) == (2048, 5e4)
    ours, again = PreTrainedTokenizerFast.from_pretrained(base), read_tokenizer(gguf.GGUFReader(files[0]).fields)
    text = "What color is the shape? 37 birds, 漢字\n<|im_end|> red"
    assert again(text).input_ids == ours(text).input_ids
    # 12 rows a head, in halves of 6: neighbours are k and k + 6.
    assert values(tensors["blk.0.attn_q.bias"])[:14].tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11, 12, 18]
    assert values(tensors["blk.0.attn_v.bias"]).tolist() == list(range(24))


def test_a_stop_string_that_is_one_token_ends_answers(tmp_path: Path) -> None:
    base = make_byte_level(tmp_path / "base")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    (base / "generation_config.json").unlink()
    files, stop = export(base, tmp_path / "out", conv_mode="mpt")
    fields, _ = read(files[0])
    assert stop is None
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (0, 2)
    assert fields["tokenizer.chat_template"] == jinja_template(conv_templates["mpt"])


def test_a_projector_with_its_base_and_a_tower_in_the_checkpoint(tmp_path: Path, clip: Path, chat: Path) -> None:
    stage_one = tiny.make_projector_only(tmp_path / "stage-one", chat)
    base = tiny.make_base(tmp_path / "base")
    export(stage_one, tmp_path / "out", base, outtype="f32")
    _, tensors = read(tmp_path / "out" / "model-f32.gguf")
    expected = load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(values(tensors["blk.1.ffn_up.weight"]), expected)
    _, tensors = read(tmp_path / "out" / "mmproj-f32.gguf")
    stored = load_file(chat / "model.safetensors")["model.mm_projector.2.weight"]
    assert torch.equal(values(tensors["mm.2.weight"]), stored)
    tuned = make(tmp_path / "tuned", clip, embed_tower=True)
    weights = load_file(tuned / "model.safetensors")
    name = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    weights[name] = torch.full_like(weights[name], 0.5)
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    export(tuned, tmp_path / "tuned-out", outtype="f32")
    _, tensors = read(tmp_path / "tuned-out" / "mmproj-f32.gguf")
    assert values(tensors["v.pre_ln.weight"]).unique().tolist() == [0.5]


def test_one_weight_is_in_memory_at_a_time(chat: Path, tmp_path: Path, monkeypatch: Any) -> None:
    alive: set[int] = set()
    most = 0
    original = WeightSource.read

    def tracked(self: WeightSource, name: str) -> torch.Tensor:
        nonlocal most
        tensor = original(self, name)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(WeightSource, "read", tracked)
    export(chat, tmp_path / "out", outtype="q8_0")
    assert most == 1


def test_what_reads_back_differently_is_not_kept(chat: Path, tmp_path: Path, monkeypatch: Any) -> None:
    original = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, data: original(self, np.zeros_like(data)))
    with pytest.raises(CheckpointError, match=r"model-f16.gguf does not read back as it was written"):
        export(chat, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refusal(directory: Path, **options: Any) -> str:
    out = directory.parent / "refused"
    with pytest.raises(ConfigError) as error:
        export(directory, out, **options)
    assert not out.exists()
    return str(error.value)


def test_refusals(tmp_path: Path, clip: Path, tiny_dirs: dict[str, Path], capsys: Any) -> None:
    command = ["export", "--format", "gguf", "--output", str(tmp_path / "out"), "--model-path"]
    assert cli.main([*command, str(tiny_dirs["chat"])]) == 2
    told = capsys.readouterr().err
    assert "because its vision tower is intern_vit_6b; llama.cpp supports LLaMA with a CLIP tower" in told
    assert "--text-only" in told
    assert cli.main([*command, str(tiny_dirs["chat"]), "--text-only"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-f16.gguf"]
    assert cli.main(["export", "--format", "hf-llava", *command[3:], str(tiny_dirs["chat"]), "--text-only"]) == 2
    assert "belong to --format gguf" in capsys.readouterr().err
    assert "its language model is mpt, not LLaMA" in refusal(tiny.make_mpt_base(tmp_path / "mpt"))
    assert "has dynamic scaling" in refusal(
        tiny.make_base(tmp_path / "dynamic", rope_scaling={"type": "dynamic", "factor": 2.0})
    )
    assert "activation is gelu, not silu" in refusal(tiny.make_base(tmp_path / "gelu", hidden_act="gelu"))
    cls_patch = make(tmp_path / "cls", clip, mm_vision_select_feature="cls_patch")
    assert "include the class token" in refusal(cls_patch)
    silu = tiny.make_clip_tower(tmp_path / "silu-tower", hidden_act="silu")
    assert "activation of its vision tower is silu" in refusal(make(tmp_path / "silu", silu))
    adapter = tiny.make_lora(tmp_path / "lora", tiny_dirs["chat"], tiny_dirs["base"])
    assert "merge it first with scripts/merge_lora_weights.py" in refusal(adapter)


def test_refused_tokenizers_and_values(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    base = make_byte_level(tmp_path / "base")
    file = base / "tokenizer.json"
    data = json.loads(file.read_text())
    for key, value, reason in (
        ("normalizer", {"type": "NFC"}, r"it normalizes text \(NFC\)"),
        ("pre_tokenizer", {"type": "Whitespace"}, "its pre-tokenizer is not gpt-2 or smollm's"),
        ("decoder", None, "it is not byte-level BPE and has no tokenizer.model"),
    ):
        file.write_text(json.dumps({**data, key: value}))
        with pytest.raises(ConfigError, match=f"tokenizer of .*base cannot be exported as gguf, because {reason}"):
            export(base, tmp_path / "out")
    file.write_text(json.dumps(data))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4, 5]}))
    assert "4 tokens end an answer, and a GGUF file has 3" in refusal(base)
    large = shutil.copytree(tiny_dirs["base"], tmp_path / "large")
    weights = dict(iter_tensors(large, lambda name: True))
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] + 1e5
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    assert "blk.1.ffn_up.weight has values out of the range of f16" in refusal(large)
    export(large, tmp_path / "out", outtype="bf16")


def test_the_package_is_optional(chat: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"pip install 'llava\[export\]'"):
        export(chat, tmp_path / "out")
