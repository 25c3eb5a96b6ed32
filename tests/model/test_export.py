"""Export to transformers' LLaVA layout: equal logits, and errors for models it cannot represent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava import cli
from llava.errors import CheckpointError, ConfigError
from llava.model import export
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import Kind, inspect
from tests import tiny
from tests.model.test_builder import edit_config
from tests.model.test_chat_template import holds_template


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tiny.make_clip_tower(tmp_path / "clip")


def make(directory: Path, clip: Path, **overrides: Any) -> Path:
    return tiny.make_chat(directory, clip, **{"mm_vision_select_layer": -2, **overrides})


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": 2},
        {"vocab_size": 390},
    ],
    ids=["patch", "tied", "cls_patch", "padded vocabulary"],
)
@torch.no_grad()
def test_the_stock_class_computes_the_same(tmp_path: Path, clip: Path, overrides: dict[str, Any], capsys: Any) -> None:
    chat = make(tmp_path / "chat", clip, **overrides)
    out = tmp_path / "out"
    assert cli.main(["export", "--format", "hf-llava", "--model-path", str(chat), "--output", str(out)]) == 0
    assert "same logits" in capsys.readouterr().out
    assert inspect(out).kind is Kind.HF_LLAVA
    stock = LlavaForConditionalGeneration.from_pretrained(out).eval()
    token = stock.config.image_token_index
    assert token == 384
    ours = load_pretrained_model(chat, device="cpu")[1]
    before, after = torch.tensor([[1, 5, 17, 9]]), torch.tensor([[40, 41, 42]])
    pixels = torch.randn(1, 3, 56, 56)
    expected = ours(input_ids=torch.cat([before, torch.tensor([[-200]]), after], 1), images=pixels).logits
    ids = torch.cat([before, torch.tensor([[token]]), after], 1)
    found = stock(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)
    assert bool((found[..., expected.shape[-1] :] < expected.amax(-1, keepdim=True)).all())  # <image> never wins


def test_the_stock_processor_reads_it(tmp_path: Path, clip: Path) -> None:
    out = tmp_path / "out"
    export.export(make(tmp_path / "chat", clip), out)
    processor = LlavaProcessor.from_pretrained(out)
    assert holds_template(out, "v1")
    assert (out / "chat_template.jinja").read_text() == processor.tokenizer.chat_template
    assert {"tokenizer.json", "tokenizer.model"} <= {path.name for path in out.iterdir()}
    inputs = processor("USER: <image> Why? ASSISTANT:", Image.new("RGB", (80, 60), (9, 99, 9)), return_tensors="pt")
    assert int((inputs["input_ids"] == 384).sum()) == 1
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize(("feature", "strategy", "tokens"), [("patch", "default", 16), ("cls_patch", "full", 17)])
def test_newer_processors_can_count_the_image_tokens(
    tmp_path: Path, clip: Path, feature: str, strategy: str, tokens: int
) -> None:
    """With the rule of `LlavaProcessor` as of transformers 4.46: one token less with `default`."""
    chat = make(tmp_path / "chat", clip, mm_vision_select_feature=feature)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "do_sample": True, "top_p": 0.6}))
    export.export(chat, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert (found["processor_class"], found["image_token"]) == ("LlavaProcessor", "<image>")
    assert found["vision_feature_select_strategy"] == strategy
    count = (56 // found["patch_size"]) ** 2 + found["num_additional_image_tokens"] - (strategy == "default")
    model = load_pretrained_model(chat, device="cpu")[1]
    assert count == tokens == model.encode_images(torch.zeros(1, 3, 56, 56)).shape[1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_feature_select_strategy"] == strategy
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_p"]) == ([2, 3], 0.6)


def test_half_precision_is_kept(tmp_path: Path, clip: Path) -> None:
    chat = make(tmp_path / "chat", clip)
    model = load_pretrained_model(chat, device="cpu", dtype="bfloat16")[1]
    model.save_pretrained(chat)
    export.export(chat, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert not any(key.startswith("mm_") for key in [*config, *config["text_config"]])


def test_refusals(tmp_path: Path, clip: Path, tiny_dirs: dict[str, Path], capsys: Any) -> None:
    command = ["export", "--format", "hf-llava", "--model-path", str(tiny_dirs["chat"])]
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "because its vision tower is intern_vit_6b; LlavaFor" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="its projector is linear"):
        export.export(make(tmp_path / "linear", clip, mm_projector_type="linear"), tmp_path / "out")
    with pytest.raises(ConfigError, match="im_start"):
        export.export(make(tmp_path / "tokens", clip, mm_use_im_start_end=True), tmp_path / "out")
    eva = tiny.make_clip_tower(tmp_path / "eva-tower", q_bias=True)
    with pytest.raises(ConfigError, match="EVA-CLIP"):
        export.export(make(tmp_path / "eva", eva), tmp_path / "out")
    broken = make(tmp_path / "broken", clip)
    edit_config(broken, torch_dtype="nonsense")
    with pytest.raises(CheckpointError, match="configuration of .* is invalid"):
        export.export(broken, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not take images"):
        export.export(tiny_dirs["base"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_export_is_not_kept(tmp_path: Path, clip: Path, monkeypatch: Any) -> None:
    """With the projector layers swapped, the directory loads but has other logits."""
    chat = make(tmp_path / "chat", clip, hidden_size=32, num_attention_heads=4)
    swapped = [(old, new.replace("_1", "_x").replace("_2", "_1").replace("_x", "_2")) for old, new in export.RENAMED]
    monkeypatch.setattr(export, "RENAMED", swapped)
    with pytest.raises(CheckpointError, match="The export and its source do not agree"):
        export.export(chat, tmp_path / "out")
    assert not (tmp_path / "out").exists()
