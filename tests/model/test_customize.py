"""The page docs/Customize_Component.md is true: its tower and its language model load, check and compute (EXT-1)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, MistralConfig, MistralForCausalLM

from llava.engine import Engine, Request, SamplingParams
from llava.errors import CheckpointError
from llava.mm_utils import tokenizer_image_token
from llava.model import registry
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.checkpoint import Kind
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests import tiny
from tests.model.test_builder import edit_config
from tests.test_package import ROOT

PAGE = (ROOT / "docs" / "Customize_Component.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINE = re.compile(r'^    "(\w+)": "llava\.model\.(multimodal_encoder|language_model)\.(\w+):[A-Z_]+",$', re.MULTILINE)


def short(example: str) -> str:
    assert len([line for line in example.splitlines() if line.strip()]) <= 30
    return example


@pytest.fixture
def dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's file and line in place, and a tiny DINOv2."""
    example = short(EXAMPLES[0])
    [(key, _, name)] = [found for found in LINE.findall(PAGE) if found[1] == "multimodal_encoder"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"custom_{name}.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setitem(registry.TOWERS, key, f"custom_{name}:TOWER")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    yield tmp_path / "dinov2"
    sys.modules.pop(f"custom_{name}", None)


@torch.no_grad()
def test_the_example_of_the_page(dinov2: Path, tmp_path: Path) -> None:
    chat = tiny.make_chat(tmp_path / "chat", dinov2, mm_vision_select_layer=-2)
    assert "dinov2, 4 of 4 layers, width 32" in examine(dinov2).parts[0].detail
    assert "dinov2, 3 of 4 layers, width 32" in examine(chat).parts[2].detail
    _, model, processor, _ = load_pretrained_model(chat, device="cpu")
    assert processor.crop_size == {"height": 56, "width": 56}
    pixels = torch.randn(2, 3, 56, 56)
    features = model.get_vision_tower()(pixels)  # type: ignore[misc]
    stock = Dinov2Model.from_pretrained(dinov2).eval()
    expected = stock(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(features, expected)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert "model.vision_tower.vision_tower.encoder.layer.3.norm1.weight" in saved  # whole, like any other tower


def test_without_the_line_it_is_unknown(dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.TOWERS, "dinov2")
    with pytest.raises(CheckpointError, match="'dinov2', which is not one of clip"):
        build_vision_tower(SimpleNamespace(vision_tower=str(dinov2), mm_vision_select_layer=-2), delay_load=False)


@torch.no_grad()
def test_the_language_model_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_dirs: dict[str, Path]
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "custom_mistral.py").write_text(short(EXAMPLES[1]), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "code")
    lines = [(key, name) for key, room, name in LINE.findall(PAGE) if room == "language_model"]
    assert lines == [("mistral", "llava_mistral"), ("llava_mistral", "llava_mistral")]
    for key, _ in lines:
        monkeypatch.setitem(registry.LANGUAGE_MODELS, key, "custom_mistral:LANGUAGE_MODEL")
    tokenizer = tiny.make_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    stock = MistralForCausalLM(MistralConfig(**tiny.llama_settings(vocab_size=len(tokenizer)))).eval()
    stock.save_pretrained(tmp_path / "base")
    tiny.make_projector_only(tmp_path / "projector", tiny_dirs["chat"])
    edit_config(tmp_path / "projector", model_type="llava_mistral")
    assert examine(tmp_path / "base").found.kind is Kind.LANGUAGE_MODEL
    assert len(examine(tmp_path / "projector", tmp_path / "base").parts) == 3
    _, model, processor, _ = load_pretrained_model(tmp_path / "projector", tmp_path / "base", device="cpu")
    words = torch.tensor([[1, 5, 9, 11]])
    assert torch.equal(model(words).logits, stock(words).logits)
    params = SamplingParams(max_new_tokens=4)
    prompt, picture = "<image>\nWhy?", torch.linspace(-1, 1, 3 * 56 * 56).reshape(3, 56, 56)
    (answer,) = Engine(model, tokenizer, processor).generate([Request(prompt, [picture], params)])
    ids = torch.tensor([tokenizer_image_token(prompt, tokenizer)])
    alone = model.generate(ids, images=picture[None], max_new_tokens=4, do_sample=False)
    assert answer.token_ids == tuple(alone[0, ids.shape[1] :].tolist())
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    whole = load_pretrained_model(tmp_path / "whole", device="cpu", load_8bit=True)[1]
    assert type(whole).__name__ == "LlavaMistralForCausalLM"
    assert whole.model.layers[0].mlp.up_proj.weight.dtype is torch.int8
