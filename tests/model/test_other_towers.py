"""EVA-CLIP and InternVL-14B against their formulas, written out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, silu
from transformers import CLIPImageProcessor

from llava.errors import ConfigError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import TOWER as CLIP
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionModel
from llava.model.multimodal_encoder.internvl_14b import TOWER as INTERNVL
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from tests.model.test_towers_and_projectors import encode_by_layer

Weights = dict[str, Tensor]
EVA = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
       "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "q_bias": True, "k_bias": False, "v_bias": True,
       "post_layernorm": False}  # fmt: skip
VISION = {"model_type": "intern_vit_6b", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
          "num_hidden_layers": 4, "image_size": 28}  # fmt: skip
QLLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 9}
INTERNVL_14B = {"model_type": "internvl", "vision_config": VISION, "qllama_config": QLLAMA, "num_query_token": 5}


def write_tower(directory: Path, settings: dict[str, Any], weights: Weights) -> VisionTower:
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(weights, directory / "model.safetensors")
    CLIPImageProcessor(size=28, crop_size=28).save_pretrained(directory)
    args = SimpleNamespace(vision_tower=str(directory), mm_vision_select_layer=-2, mm_vision_image_size=28)
    tower = build_vision_tower(args, delay_load=False)
    assert isinstance(tower, VisionTower)
    return tower


def random_weights(module: torch.nn.Module) -> Weights:
    return {name: torch.randn_like(value) * 0.3 + ("norm" in name) for name, value in module.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True])
def test_eva(tmp_path: Path, after: bool) -> None:
    settings = {**EVA, "post_layernorm": after}
    weights = random_weights(CLIP.build(CLIP.config(settings), 3))
    assert "vision_model.embeddings.patch_embedding.bias" in weights
    assert not any("pre_layrnorm" in name or "k_proj.bias" in name for name in weights)
    pixels = torch.randn(2, 3, 28, 28)
    tower = write_tower(tmp_path, settings, {**weights, "vision_model.post_layernorm.weight": torch.ones(16)})
    w = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    x = conv2d(pixels, w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"], stride=14)
    x = torch.cat([w["embeddings.class_embedding"].expand(2, 1, 16), x.flatten(2).mT], 1)
    x = x + w["embeddings.position_embedding.weight"]
    for i in range(2):
        p = {k.removeprefix(f"encoder.layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        x = eva_layer(x, p, after)
    torch.testing.assert_close(tower(pixels), x[:, 1:], atol=1e-5, rtol=1e-5)


def eva_layer(x: Tensor, p: Weights, after: bool) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()))

    def norm(name: str, value: Tensor) -> Tensor:
        return layer_norm(value, (16,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def attention(value: Tensor) -> Tensor:
        q, k, v = (linear(f"self_attn.{n}_proj", value) for n in "qkv")
        heads = [((q[..., s] * 8**-0.5) @ k[..., s].mT).softmax(-1) @ v[..., s] for s in (slice(0, 8), slice(8, 16))]
        return linear("self_attn.out_proj", torch.cat(heads, -1))

    def mlp(value: Tensor) -> Tensor:
        return linear("mlp.fc2", gelu(linear("mlp.fc1", value)))

    if after:
        x = x + norm("layer_norm1", attention(x))
        return x + norm("layer_norm2", mlp(x))
    x = x + attention(norm("layer_norm1", x))
    return x + mlp(norm("layer_norm2", x))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [(q[..., s] @ k[..., s].mT * 8**-0.5).softmax(-1) @ v[..., s] for s in (slice(0, 8), slice(8, 16))]
    return torch.cat(parts, -1)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding, base 10000, of each 8-wide head at positions 0 …"""
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = angle.cos(), angle.sin()
    out = []
    for part in x.split(8, dim=-1):
        a, b = part[..., :4], part[..., 4:]
        out.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
    return torch.cat(out, -1)


@torch.no_grad()
def test_internvl_14b(tmp_path: Path) -> None:
    module = INTERNVL.build(INTERNVL.config(INTERNVL_14B), 3)
    weights = random_weights(module)
    cross = {name.split(".")[3] for name in weights if "cross_attn" in name}
    assert cross == {"0", "2"}
    extra = {
        "qllama.lm_head.weight": torch.zeros(9, 16),
        "itm_head.weight": torch.zeros(2),
        "logit_scale": torch.ones(1),
    }
    tower = write_tower(tmp_path, INTERNVL_14B, {**weights, **extra})
    pixels = torch.randn(2, 3, 28, 28)
    image, queries = tower(pixels)
    in_parts, parts = encode_by_layer(tower, pixels)
    assert parts == 1 and torch.equal(in_parts[0], image) and torch.equal(in_parts[1], queries)

    vit = InternVisionModel(INTERNVL.config(INTERNVL_14B).vision_config).eval()
    vit.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in weights.items() if k.startswith("vision_model.")}
    )
    states = vit(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(image, states[-2][:, 1:], atol=1e-5, rtol=1e-5)

    h = weights["query_tokens"].expand(2, -1, -1)
    for i in range(3):
        p = {k.split(f"layers.{i}.")[1]: v for k, v in weights.items() if f"qllama.model.layers.{i}." in k}
        x = rms(h, p["input_layernorm.weight"])
        q, k, v = (x @ p[f"self_attn.{n}_proj.weight"].T for n in "qkv")
        h = h + heads(rotate(q), rotate(k), v) @ p["self_attn.o_proj.weight"].T
        if i % 2 == 0:
            x, e = rms(h, p["cross_attn.norm1.weight"]), rms(states[-1], p["cross_attn.norm2.weight"])
            q = x @ p["cross_attn.q_proj.weight"].T
            k, v = (e @ p[f"cross_attn.{n}_proj.weight"].T for n in "kv")
            h = h + heads(q, k, v) @ p["cross_attn.o_proj.weight"].T
        x = rms(h, p["post_attention_layernorm.weight"])
        h = h + (silu(x @ p["mlp.gate_proj.weight"].T) * (x @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    torch.testing.assert_close(queries, rms(h, weights["qllama.model.norm.weight"]), atol=1e-4, rtol=1e-4)

    assert (tower.hidden_size, tower.image_hidden_size) == (16, 32)
    assert tower.feature_shapes == [(4, 32), (5, 16)]
    projector = build_vision_projector(
        SimpleNamespace(mm_projector_type="two_mlp", mm_hidden_size=16, mm_image_hidden_size=32, hidden_size=6)
    )
    assert projector((image, queries)).shape == (2, 9, 6)
    assert set(tower.unused_tensors()) == {"vision_tower.qllama.lm_head.weight"}


def test_unmerged_lora_in_internvl_is_refused() -> None:
    with pytest.raises(ConfigError, match="unmerged LoRA"):
        INTERNVL.config({**INTERNVL_14B, "use_qllama_lora": 16})


def test_stock_clip_keys_are_all_used(tmp_path: Path) -> None:
    """A composite CLIP directory (text tower and all) loads its vision part."""
    from transformers import CLIPConfig, CLIPModel

    vision = {k: v for k, v in EVA.items() if k not in ("q_bias", "k_bias", "v_bias", "post_layernorm")}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    tower = write_tower(tmp_path, settings, load_file(tmp_path / "model.safetensors"))
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        want = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(pixels), want, atol=1e-5, rtol=1e-5)
