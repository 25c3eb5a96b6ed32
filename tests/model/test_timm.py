"""Any timm vision transformer as the tower: `--vision_tower timm/NAME[:FILE]`, with random weights at small size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import eva, register_model, vision_transformer

from llava.engine import Engine, Request, SamplingParams
from llava.errors import CheckpointError, ConfigError
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from tests import tiny
from tests.model.test_towers_and_projectors import encode_by_layer

# The published layouts, narrow and shallow. Keys, prefix tokens and positions are those of the full-size models.
SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2}
DINOV2 = {"patch_size": 14, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True, "img_size": 70}
SIGLIP = {"patch_size": 14, "class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", "img_size": 70}
EVA02 = {"patch_size": 14, "mlp_ratio": 8 / 3, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True,
         "use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "img_size": 70}  # fmt: skip


def cfg(**settings: Any) -> dict[str, Any]:
    return {"input_size": (3, 70, 70), "interpolation": "bicubic", "crop_pct": 0.875, "mean": (0.5, 0.4, 0.3),
            "std": (0.5, 0.6, 0.7), "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
            **settings}  # fmt: skip


def register(family: Any, name: str, create: Callable[..., Any], **arguments: Any) -> None:
    """Add a model to timm, once in a process."""
    if timm.is_model(name):
        return

    def make(pretrained: bool = False, **kwargs: Any) -> Any:
        return create(name, pretrained=pretrained, **{**SMALL, **arguments, **kwargs})

    make.__name__, make.__module__ = name, family.__name__
    family.default_cfgs[name] = timm.models.generate_default_cfgs({name: cfg()})[name]
    register_model(make)


@pytest.fixture(scope="module", autouse=True)
def small_models() -> None:
    register(vision_transformer, "vit_test_reg4_dinov2", vision_transformer._create_vision_transformer, **DINOV2)
    register(vision_transformer, "vit_test_siglip", vision_transformer._create_vision_transformer, **SIGLIP)
    register(eva, "eva02_test", eva._create_eva, **EVA02)


NAMES = {"vit_test_reg4_dinov2": (True, 4), "vit_test_siglip": (False, 0), "eva02_test": (True, 0)}


def stock(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, dynamic_img_size=True, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def weights(directory: Path, name: str, suffix: str = "safetensors") -> Path:
    state = stock(name).state_dict()
    file = directory / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def arguments(name: str, **overrides: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"vision_tower": name, "mm_vision_select_layer": -2, **overrides})


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("layer", "size"), [(-2, None), (-1, None), (1, 42)])
def test_features_are_timms_own(name: str, layer: int, size: int | None, tmp_path: Path) -> None:
    file = weights(tmp_path, name, "safetensors" if layer == -2 else "bin")
    tower = build_vision_tower(
        arguments(f"timm/{name}:{file}", mm_vision_select_layer=layer, mm_vision_image_size=size), delay_load=False
    )
    side = size or 70
    assert tower.image_processor.crop_size == {"height": side, "width": side}
    depth = layer if layer >= 0 else 5 + layer
    assert len(tower.vision_tower.blocks) == tower.depth == depth
    images = torch.randn(2, 3, side, side)
    features = tower(images)
    assert tower.feature_shapes == [tuple(features.shape[1:])] == [((side // 14) ** 2, 32)]
    expected = stock(name).forward_intermediates(images, [depth - 1], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(features, expected)
    in_parts, parts = encode_by_layer(tower, images)
    assert torch.equal(in_parts, features) and parts in (1, depth)  # 1: its layers take more than the tokens
    assert (tower.spec.class_token, tower.spec.registers) == NAMES[name]


@torch.no_grad()
def test_the_class_token_is_a_feature_where_there_is_one(tmp_path: Path) -> None:
    name = "vit_test_reg4_dinov2"
    file = weights(tmp_path, name)
    tower = build_vision_tower(arguments(f"timm/{name}:{file}", mm_vision_select_feature="cls_patch"))
    images = torch.randn(1, 3, 70, 70)
    patches, prefix = stock(name).forward_intermediates(
        images, [2], output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )[0]
    torch.testing.assert_close(tower(images), torch.cat([prefix[:, :1], patches], dim=1))
    assert tower.feature_shapes == [(26, 32)]
    siglip = weights(tmp_path, "vit_test_siglip")
    with pytest.raises(ConfigError, match="'cls_patch' needs a class token"):
        build_vision_tower(arguments(f"timm/vit_test_siglip:{siglip}", mm_vision_select_feature="cls_patch"))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_preprocessing_is_timms(mode: str) -> None:
    settings = {"model_type": "timm", "architecture": "eva02_test", "pretrained_cfg": cfg(crop_mode=mode)}
    tower = VisionTower("timm/eva02_test", arguments("", mm_vision_tower_config=settings))
    image = Image.effect_noise((90, 120), 60).convert("RGB")
    (pixels,) = tower.image_processor.preprocess(image, return_tensors="pt")["pixel_values"]
    options = timm.data.resolve_data_config(pretrained_cfg=settings["pretrained_cfg"])
    transform: Any = timm.data.create_transform(**options, is_training=False)
    expected = transform(image)
    assert pixels.shape == expected.shape == (3, 70, 70)
    torch.testing.assert_close(pixels, expected)


def test_a_directory_in_timms_layout(tmp_path: Path) -> None:
    name = "vit_test_siglip"
    shutil.move(weights(tmp_path, name), tmp_path / "model.safetensors")
    settings = {"architecture": name, "num_classes": 0, "pretrained_cfg": {**cfg(), "tag": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "timm, 4 of 4 layers, width 32" in examine(tmp_path).parts[0].detail
    tower = build_vision_tower(arguments(str(tmp_path)))
    assert tower(torch.zeros(1, 3, 70, 70)).shape == (1, 25, 32)
    for change, why in (
        ({"model_args": {"img_size": 70, "depth": 3}}, "sets depth in model_args"),
        ({"architecture": "hf-hub:somebody/model"}, "has no model 'hf-hub:somebody/model'"),
        ({"architecture": "resnet18"}, "'resnet18' is not a plain vision transformer"),
        ({"pretrained_cfg": None}, "configuration of .* is invalid"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(CheckpointError, match=why):
            build_vision_tower(arguments(str(tmp_path)))


def test_names_and_files_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"offline mode.*--vision-tower timm/eva02_test:FILE"):
        build_vision_tower(arguments("timm/eva02_test"))
    with pytest.raises(CheckpointError, match="nowhere.bin"):
        build_vision_tower(arguments("timm/eva02_test:nowhere.bin"))
    file = weights(tmp_path, "eva02_test")
    with pytest.raises(CheckpointError, match=r"has no model 'eva03_test'.*timm.list_models"):
        build_vision_tower(arguments(f"timm/eva03_test:{file}"))
    save_file({"visual.pos_embed": torch.zeros(1, 26, 32)}, file)
    with pytest.raises(CheckpointError, match="does not contain 'pos_embed'"):
        build_vision_tower(arguments(f"timm/eva02_test:{file}"))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_chat_checkpoint_reloads_without_the_file(name: str, tmp_path: Path) -> None:
    """Trained with the file, saved whole, loaded for chat and for training where only the checkpoint is."""
    file = weights(tmp_path, name)
    settings = {"mm_vision_select_layer": -2, "mm_vision_image_size": None}
    chat = tiny.make_chat(tmp_path / "chat", Path("unused"), mm_vision_tower=f"timm/{name}:{file}", **settings)
    tokenizer, model, processor, _ = load_pretrained_model(chat, device="cpu")
    assert model.num_image_tokens == 25
    image = torch.randn(3, 70, 70)
    request = Request([1, 300, -200, 301, 302], [image], SamplingParams(max_new_tokens=6))
    (answer,) = Engine(model, tokenizer, processor).generate([request])
    core = model.get_model()
    core.initialize_vision_modules(arguments(f"timm/{name}:{file}", mm_projector_type="mlp2x_gelu",
                                             mm_vision_select_feature="patch"))  # fmt: skip
    assert model.config.mm_vision_tower_config["architecture"] == name
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    whole = {f"model.vision_tower.vision_tower.{key}" for key in stock(name).state_dict() if "attn_pool" not in key}
    assert whole == {key for key in saved if "vision_tower" in key}  # like any other tower
    file.unlink()
    again = load_pretrained_model(tmp_path / "saved", device="cpu")
    (repeated,) = Engine(again[1], again[0], again[2]).generate([request])
    assert repeated.token_ids == answer.token_ids
    assert len(examine(tmp_path / "saved").parts) == 3
    trained = again[1].get_model()
    trained.initialize_vision_modules(arguments(f"timm/{name}:{file}", mm_projector_type="mlp2x_gelu",
                                                mm_vision_select_feature="patch"))  # fmt: skip
    assert trained.vision_tower.is_loaded
