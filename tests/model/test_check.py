"""`llava check`: directories are identified and verified without reading weights; memory figures match a real load."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from llava import cli
from llava.errors import CheckpointError, LlavaError, TemplateError
from llava.model import check
from llava.model.builder import load_pretrained_model
from llava.model.check import examine, report
from llava.model.checkpoint import Kind
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel
from llava.model.weights import empty_weights
from tests import tiny
from tests.model import zoo
from tests.model.test_builder import edit_config


@pytest.fixture
def made(tiny_dirs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of the chat model, a projector and an adapter that name the tiny base."""
    return {
        **tiny_dirs,
        "chat": shutil.copytree(tiny_dirs["chat"], tmp_path / "chat"),
        "projector": tiny.make_projector_only(tmp_path / "projector", tiny_dirs["chat"]),
        "lora": tiny.make_lora(tmp_path / "lora", tiny_dirs["chat"], tiny_dirs["base"]),
    }


@pytest.mark.parametrize(
    ("name", "base", "kind", "words"),
    [
        ("chat", None, Kind.FULL, ["2 layers, width 48, vocabulary 384", "mlp2x_gelu, 32 to 48", "v1 (stored",
                                   "56 px, 16 tokens", "3 of 6 layers", "2048 tokens"]),
        ("base", None, Kind.LANGUAGE_MODEL, ["21 weights", "384 entries", "--model-base"]),
        ("tower", None, Kind.TOWER, ["6 of 6 layers", "width 32"]),
        ("projector", "base", Kind.PROJECTOR, ["vicuna-tiny (a text-only", "mm_projector.bin"]),
        ("lora", None, Kind.LORA, ["vicuna-tiny (a text-only", "non_lora_trainables.bin"]),
    ],
)  # fmt: skip
def test_the_report(made: dict[str, Path], name: str, base: str | None, kind: Kind, words: list[str]) -> None:
    findings = examine(made[name], made[base] if base else None)
    assert findings.found.kind is kind
    page = report(findings)
    assert page.startswith(f"{made[name]} holds {kind.value}")
    assert [word for word in words if word not in page] == []


def test_the_program(made: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert cli.main(["check", str(made["chat"])]) == 0
    assert "a full chat checkpoint (model_type llava_llama)" in capsys.readouterr().out
    assert cli.main(["check", str(made["projector"])]) == 2
    assert capsys.readouterr().err.endswith("--model-base lmsys/vicuna-7b-v1.5. [CHECKPOINT]\n")
    assert cli.main(["check", str(made["projector"]), "--model-base", "someone/unknown"]) == 2
    assert "offline mode" in capsys.readouterr().err
    assert cli.main(["check", "someone/unknown"]) == 2  # a name on the hub, which may be in the cache
    assert "it is not in the Hugging Face cache" in capsys.readouterr().err
    assert "HF_HUB_OFFLINE" not in check.os.environ


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava", "vision_config": {}}, "LlavaForConditionalGeneration"),
        ({"model_type": "internvl_chat"}, "InternVL repository"),
        ({"model_type": "mistral"}, "mm_vision_tower"),
        ({}, "no checkpoint"),
    ],
)
def test_refusals(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        examine(tmp_path)


def test_damage_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(made["chat"] / "model.safetensors")
    norm = state.pop("model.norm.weight")
    save_file({**state, "model.surprise": norm}, made["chat"] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(model.norm.weight\); 1 unexpected \(model.surprise\)"):
        examine(made["chat"])
    edit_config(made["projector"], mm_projector_type="linear")
    with pytest.raises(CheckpointError, match="does not fit the configured projector"):
        examine(made["projector"], made["base"])
    tower = shutil.copytree(made["tower"], tmp_path / "tower")
    state = load_file(tower / "model.safetensors")
    del state["encoder.layers.5.ls1"]
    save_file(state, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing \(encoder.layers.5.ls1\)"):
        examine(tower)
    chat = tiny.make_chat(tmp_path / "other", tower)  # its features come after layer 3, so it is whole
    assert examine(chat).parts[2].name == "vision tower"
    with pytest.raises(CheckpointError, match="tried /nowhere"):
        examine(chat, vision_tower="/nowhere")


@pytest.mark.parametrize("key", ["mm_hidden_size", "mm_vision_select_layer"])
def test_a_configuration_without_its_keys(made: dict[str, Path], key: str) -> None:
    edit_config(made["chat"], **{key: None})
    with pytest.raises(CheckpointError, match=f"config.json has no {key}; copy it"):
        examine(made["chat"])


def test_the_template(made: dict[str, Path]) -> None:
    assert ("template", "llava_v0 (--conv-mode)") in examine(made["chat"], template="llava_v0").facts
    with pytest.raises(TemplateError):
        examine(made["chat"], template="nonsense")
    edit_config(made["chat"], conv_template=None)
    assert ("template", "vicuna_v1 (not stored)") in examine(made["chat"]).facts


def test_memory_is_that_of_a_load(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    """Every byte of parameters in 32 and 16 bit; within 1 % for quantized weights (of supported widths)."""
    chat = tiny.make_chat(tmp_path / "wide", tiny_dirs["tower"], hidden_size=64, intermediate_size=128)
    parts = examine(chat).parts
    for label, options in (("fp32", {}), ("bf16", {"dtype": "bfloat16"})):
        model = load_pretrained_model(chat, device="cpu", **options)[1]
        assert sum(part.bytes(label) for part in parts) == sum(p.numel() * p.element_size() for p in model.parameters())
    model = load_pretrained_model(chat, device="cpu", dtype="bfloat16", load_4bit=True)[1]
    held = 0
    for parameter in model.model.layers.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        held += 0 if state is None else state.absmax.numel() + 4 * state.state2.absmax.numel()
    decoder = {name: shape for name, shape in parts[0].shapes.items() if name.startswith("model.layers.")}
    assert check.Part("", "", decoder).bytes("nf4") == pytest.approx(held, rel=0.01)
    assert check.Part("", "", decoder).bytes("int8") < 0.6 * check.Part("", "", decoder).bytes("bf16")


def write_headers(directory: Path, shapes: dict[str, tuple[int, ...]], shards: int) -> None:
    """Safetensors shards of zeros (and a last norm of ones), with their index, as sparse files."""
    names, weight_map = sorted(shapes), {}
    for number in range(shards):
        header: dict[str, Any] = {}
        end, file_name = 0, f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        for name in names[number::shards]:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [start, end]}
            weight_map[name] = file_name
        text = json.dumps(header).encode()
        with (directory / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            if "model.norm.weight" in header:
                file.seek(8 + len(text) + header["model.norm.weight"]["data_offsets"][0])
                file.write(b"\x00\x3c" * shapes["model.norm.weight"][0])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_published_7b_layout_takes_seconds(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    """InternVL-Chat-ViT-6B-Vicuna-7B: tower inside, 577 positions, `model_type: llava`."""
    tower = InternVisionConfig(image_size=336)
    config = LlavaConfig(
        **{**LlamaConfig().to_dict(), "model_type": "llava"}, mm_vision_tower="./pretrained/intern_vit_6b_224px",
        mm_hidden_size=3200, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-4,
    )  # fmt: skip
    with empty_weights():
        model, vit = LlavaLlamaForCausalLM(config), InternVisionModel(tower)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {f"model.vision_tower.vision_tower.{name}": tuple(p.shape) for name, p in vit.named_parameters()}
    write_headers(tmp_path, shapes, 12)
    InternVisionConfig(image_size=224).save_pretrained(tmp_path / "intern_vit_6b_224px")
    config.save_pretrained(tmp_path)
    edit_config(tmp_path, model_type="llava")
    shutil.copy(tiny_dirs["chat"] / "tokenizer.model", tmp_path)
    start = time.perf_counter()
    findings = examine(tmp_path)
    assert time.perf_counter() - start < 30
    language, projector, vision = findings.parts
    assert language.bytes("fp32") == 4 * 6_738_415_616
    assert projector.bytes("fp32") == 4 * 29_892_608
    assert vision.shapes["embeddings.position_embedding"] == (1, 577, 3200)
    assert "45 of 48 layers" in vision.detail
    assert ("image", "336 px, 576 tokens") in findings.facts
    assert 3.5 < language.bytes("nf4") / 2**30 < 3.7


@pytest.mark.parametrize("kind", ["chat", "tower"])
def test_invalid_configurations_raise_llava_errors(tiny_dirs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    directory = shutil.copytree(tiny_dirs[kind], tmp_path / "it")
    config = json.loads((directory / "config.json").read_text())
    more = ("mm_vision_tower_config", "mm_projector_type", "rope_scaling", "conv_template", "quantization_config")
    refused = 0
    for key in (*config, *more):
        for value in ([], -1):
            (directory / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                examine(directory)
            except LlavaError:
                refused += 1
    assert refused > len(config) / 2


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("chat", {"num_hidden_layers": 10**12}, f"has {10**12} layers, but .* holds 25 weights"),
        ("tower", {"num_hidden_layers": 10**12}, f"has {10**12} layers, but .* holds 82 weights"),
        ("chat", {"pad_token_id": 384}, "AssertionError: Padding_idx"),
        ("chat", {"vocab_size": 400}, r"configuration: 2 of a different shape \(lm_head.weight is \(384, 48\)"),
        ("chat", {"max_position_embeddings": 10**9}, None),
    ],
)
def test_absurd_numbers_cost_nothing(
    tiny_dirs: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, int], message: str | None
) -> None:
    directory = shutil.copytree(tiny_dirs[kind], tmp_path / "it")
    edit_config(directory, **settings)
    start = time.perf_counter()
    if message is None:
        assert examine(directory).facts[3][1].startswith(f"{10**9} tokens")
    else:
        with pytest.raises(CheckpointError, match=message):
            examine(directory)
    assert time.perf_counter() - start < 5


def test_damage_beside_the_weights_is_found(made: dict[str, Path]) -> None:
    (made["chat"] / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config.json must contain a JSON object"):
        examine(made["chat"])
    (made["lora"] / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="adapter of type IA3"):
        examine(made["lora"], made["base"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named(made: dict[str, Path], name: str) -> None:
    (made["chat"] / "model.safetensors").unlink()
    (made["chat"] / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*; run git lfs pull"):
        examine(made["chat"])


def test_a_delta_is_refused_and_an_adapter_of_a_language_model_verified(tmp_path: Path) -> None:
    shelf = zoo.shelf(tmp_path / "made")
    zoo.delta(shelf, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="apply_delta"):
        examine(tmp_path / "delta")
    zoo.text_adapter(shelf, tmp_path / "adapter")
    assert ("use it with", "--text-only") in examine(tmp_path / "adapter").facts
    with pytest.raises(CheckpointError, match="no such weight"):
        examine(tmp_path / "adapter", shelf.mpt_base)


@pytest.mark.parametrize(
    "index", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}', "\x00"]
)
def test_an_invalid_index_is_named(tiny_dirs: dict[str, Path], tmp_path: Path, index: str) -> None:
    directory = shutil.copytree(tiny_dirs["chat"], tmp_path / "it")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json (must|cannot)"):
        examine(directory)
