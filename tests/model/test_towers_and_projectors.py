"""CLIP tower, projectors, tower wrapper behaviour, and adding vision modules to a language model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.errors import CheckpointError, ConfigError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(directory)
    CLIPImageProcessor(size=56, crop_size=56).save_pretrained(directory)
    return directory


def arguments(tower: Path, **overrides: Any) -> SimpleNamespace:
    values = {
        "vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "pretrain_mm_mlp_adapter": None,
    }
    return SimpleNamespace(**{**values, **overrides})


def tower_of(path: Path, **overrides: Any) -> VisionTower:
    tower = build_vision_tower(arguments(path, **overrides), delay_load=False)
    assert isinstance(tower, VisionTower)
    return tower


def encode_by_layer(tower: VisionTower, images: torch.Tensor) -> tuple[Any, int]:
    """Features of `images`, and the number of parts they were encoded in."""
    encoding, parts = tower.encode_by_layer(images), 0
    while True:
        try:
            next(encoding)
        except StopIteration as stop:
            return stop.value, parts
        parts += 1


@torch.no_grad()
@pytest.mark.parametrize(("layer", "feature"), [(-2, "patch"), (-1, "cls_patch"), (0, "patch"), (3, "cls_patch")])
def test_clip_features_are_the_selected_hidden_state(clip: Path, layer: int, feature: str) -> None:
    tower = tower_of(clip, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    images = torch.randn(2, 3, 56, 56)
    whole = CLIPVisionModel.from_pretrained(clip)(images, output_hidden_states=True).hidden_states
    want = whole[layer][:, 1:] if feature == "patch" else whole[layer]
    torch.testing.assert_close(tower(images), want, atol=1e-5, rtol=1e-5)
    found, parts = encode_by_layer(tower, images)
    assert torch.equal(found, tower(images)) and parts == max(1, tower.depth)
    assert len(tower.vision_tower.vision_model.encoder.layers) == (layer if layer >= 0 else 5 + layer)
    assert tower.feature_shapes == [tuple(want.shape[1:])]
    assert tower.image_processor.crop_size == {"height": 56, "width": 56}
    rest = tower.unused_tensors()
    assert "vision_tower.vision_model.post_layernorm.weight" in rest


def test_clip_has_one_resolution(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="56 px only, not at 336"):
        _ = tower_of(clip, mm_vision_image_size=336).image_processor
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(CheckpointError, match="preprocessor_config.json"):
        _ = VisionTower(str(tmp_path), arguments(tmp_path)).image_processor


def test_the_input_size_comes_from_the_last_component_only(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    for name, size in (("work_448/InternViT-6B-224px", 336), ("medieval/InternViT-6B-448px", 448)):
        place = tmp_path / name
        place.mkdir(parents=True)
        (place / "config.json").write_text((tiny_dirs["tower"] / "config.json").read_text())
        tower = VisionTower(str(place), arguments(place))
        assert tower.image_processor.crop_size["height"] == size
        assert tower.num_patches == (size // 14) ** 2
    assert VisionTower(str(place), arguments(place, mm_vision_image_size=56)).num_patches == 16


def test_wrapper(tiny_dirs: dict[str, Path]) -> None:
    tower = VisionTower(str(tiny_dirs["tower"]), arguments(tiny_dirs["tower"]))
    assert not tower.is_loaded
    assert not list(tower.parameters())
    with pytest.raises(CheckpointError, match="not loaded"):
        tower(torch.zeros(1, 3, 56, 56))
    tower.load_model(dtype=torch.bfloat16)
    tower.load_model()
    assert (tower.dtype, tower.device.type) == (torch.bfloat16, "cpu")
    features = tower(torch.zeros(2, 3, 56, 56))
    assert features.dtype is torch.float32
    assert [f.shape for f in tower([torch.zeros(3, 56, 56), torch.zeros(3, 28, 28)])] == [(1, 16, 32), (1, 4, 32)]
    assert not tower.train().vision_tower.training
    assert tower.dummy_feature.shape == (1, 32)
    with pytest.raises(CheckpointError, match="has no mm_vision_tower"):
        build_vision_tower(SimpleNamespace(mm_vision_select_layer=-1))


def test_a_trainable_position_table_gets_gradient(tiny_dirs: dict[str, Path]) -> None:
    tower = tower_of(tiny_dirs["tower"])
    table = tower.vision_tower.embeddings.position_embedding.requires_grad_(True)
    tower(torch.randn(1, 3, 56, 56)).sum().backward()
    assert table.grad is not None
    assert table.grad.abs().sum() > 0
    assert tower.vision_tower.embeddings.class_embedding.grad is None


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("linear", ["bias", "weight"]),
        ("mlp1x_gelu", ["0.bias", "0.weight"]),
        ("mlp3x_gelu", [f"{i}.{p}" for i in (0, 2, 4) for p in ("bias", "weight")]),
        ("mlp2x_gelu_ln", [f"{i}.{p}" for i in (0, 1, 3) for p in ("bias", "weight")]),
        ("identity", []),
        ("two_mlp", [f"mlp{m}.{i}.{p}" for m in (1, 2) for i in (0, 2) for p in ("bias", "weight")]),
    ],
)
def test_projector_keys(kind: str, keys: list[str]) -> None:
    width = 8 if kind == "identity" else 6
    config = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=8, hidden_size=width, mm_image_hidden_size=10)
    projector = build_vision_projector(config)
    assert sorted(projector.state_dict()) == keys
    if kind == "two_mlp":
        image, query = torch.randn(2, 5, 10), torch.randn(2, 3, 8)
        out = projector((image, query))
        assert out.shape == (2, 8, 6)
        torch.testing.assert_close(out[:, :3], projector.mlp2(query))
    else:
        x = torch.randn(2, 5, 8)
        assert projector(x).shape == (2, 5, width)


def test_identity_joins_equal_widths_only() -> None:
    with pytest.raises(ConfigError, match="tower's is 8, the language model's 6"):
        build_vision_projector(SimpleNamespace(mm_projector_type="identity", mm_hidden_size=8, hidden_size=6))


@pytest.mark.parametrize("kind", ["mlp2x_gel", "mlp2x_geluXYZ", "mlp0x_gelu", "resampler"])
def test_projector_typos_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}'.*mlpNx_gelu"):
        build_vision_projector(SimpleNamespace(mm_projector_type=kind, mm_hidden_size=8, hidden_size=6))


def test_published_projector_size() -> None:
    with torch.device("meta"):
        projector = build_vision_projector(
            SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=3200, hidden_size=5120)
        )
    assert sum(p.numel() for p in projector.parameters()) == 42_608_640


def test_initialize_vision_modules(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = LlavaLlamaForCausalLM.from_pretrained(
        tiny_dirs["base"], config=LlavaConfig.from_pretrained(tiny_dirs["base"])
    )
    assert model.get_vision_tower() is None
    core = model.get_model()
    core.initialize_vision_modules(arguments(tiny_dirs["tower"], mm_vision_image_size=56))
    assert model.config.mm_hidden_size == 32
    assert model.config.mm_vision_tower_config["model_type"] == "intern_vit_6b"
    assert core.vision_tower.is_loaded
    first = core.mm_projector
    core.initialize_vision_modules(arguments(tiny_dirs["tower"], mm_vision_image_size=56))
    assert core.mm_projector is first
    core.initialize_vision_modules(arguments(tiny_dirs["tower"], mm_projector_type="linear"))
    assert core.mm_projector is not first
    with pytest.raises(CheckpointError, match=r"no projector file .*pretraining stage"):
        core.initialize_vision_modules(
            arguments(tiny_dirs["tower"], mm_projector_type="linear", pretrain_mm_mlp_adapter=str(tmp_path / "x.bin"))
        )
    table = torch.randn(1, 257, 32)
    adapter = tmp_path / "mm_projector.bin"
    torch.save(
        {
            **{f"model.mm_projector.{name}": torch.ones_like(p) for name, p in core.mm_projector.named_parameters()},
            "model.vision_tower.vision_tower.embeddings.position_embedding": table,
        },
        adapter,
    )
    core.initialize_vision_modules(
        arguments(tiny_dirs["tower"], mm_projector_type="linear", pretrain_mm_mlp_adapter=str(adapter))
    )
    assert (core.mm_projector.weight == 1).all()
    assert torch.equal(core.vision_tower.vision_tower.embeddings.position_embedding, table)


def test_vision_tokens(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    config = LlavaConfig.from_pretrained(tiny_dirs["base"])
    model = LlavaLlamaForCausalLM.from_pretrained(tiny_dirs["base"], config=config)
    tokenizer = load_tokenizer(tiny_dirs["base"])
    mean = model.get_input_embeddings().weight.mean(0).detach().clone()
    tokens = {"mm_use_im_patch_token": False, "mm_use_im_start_end": True, "tune_mm_mlp_adapter": True}
    model.initialize_vision_tokenizer(arguments(tiny_dirs["tower"], **tokens), tokenizer)
    assert len(tokenizer) == 386
    torch.testing.assert_close(model.get_input_embeddings().weight[384:], mean.expand(2, -1))
    assert model.get_input_embeddings().weight.requires_grad
    assert not model.get_output_embeddings().weight.requires_grad
    adapter = tmp_path / "a.bin"
    for rows, problem in ((2, None), (386, None), (3, "holds"), (None, "--mm_use_im_start_end")):
        key = "model.embed_tokens.weight" if rows else "other"
        torch.save({key: torch.full((rows or 1, 48), 3.0)}, adapter)
        again = arguments(tiny_dirs["tower"], **tokens, pretrain_mm_mlp_adapter=str(adapter))
        if problem:
            with pytest.raises(CheckpointError, match=problem):
                model.initialize_vision_tokenizer(again, tokenizer)
        else:
            model.initialize_vision_tokenizer(again, tokenizer)
            assert (model.get_input_embeddings().weight[384:] == 3).all()
    model.initialize_vision_tokenizer(
        arguments(tiny_dirs["tower"], mm_use_im_patch_token=True, mm_use_im_start_end=False, tune_mm_mlp_adapter=True),
        tokenizer,
    )
    assert len(tokenizer) == 387
    assert not model.get_input_embeddings().weight.requires_grad
