"""Names and arguments that forks and evaluation harnesses of LLaVA use, with their published meaning."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaModel

from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaMetaModel
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import IdentityMap, build_vision_projector
from llava.model.utils import auto_upgrade
from tests import tiny
from tests.model.test_builder import edit_config
from tests.test_package import ROOT, plain_environment

NAMES = {
    "llava.model": ["LlavaLlamaForCausalLM", "LlavaConfig", "LlavaMptForCausalLM", "LlavaMptConfig"],
    "llava.model.builder": ["load_pretrained_model"],
    "llava.model.llava_arch": ["LlavaMetaModel", "LlavaMetaForCausalLM"],
    "llava.model.language_model.llava_llama": ["LlavaConfig", "LlavaLlamaModel", "LlavaLlamaForCausalLM"],
    "llava.model.language_model.llava_mpt": ["LlavaMptConfig", "LlavaMptModel", "LlavaMptForCausalLM"],
    "llava.model.multimodal_encoder.builder": ["build_vision_tower"],
    "llava.model.multimodal_encoder.clip_encoder": ["CLIPVisionTower"],
    "llava.model.multimodal_projector.builder": ["build_vision_projector", "IdentityMap"],
    "llava.model.utils": ["auto_upgrade"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_published_name_imports(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    assert found.__name__ == name


def test_the_model_package_is_cheap_to_import() -> None:
    program = "import sys, llava.model; print(*sys.modules); llava.model.nothing"
    environment = {**plain_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert not {"torch", "transformers"} & set(done.stdout.split())
    assert "no attribute 'nothing'; its names are LlavaConfig" in done.stderr


def test_clip_vision_tower_as_forks_use_it(tmp_path: Path) -> None:
    directory = str(tiny.make_clip_tower(tmp_path))
    args = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    delayed = CLIPVisionTower(directory, args=args, delay_load=True)
    assert not delayed.is_loaded and (delayed.hidden_size, delayed.num_patches) == (32, 16)
    delayed.load_model(device_map=None)
    tower = CLIPVisionTower(directory, args)
    assert tower.is_loaded and (tower.select_layer, tower.select_feature) == (-2, "patch")
    assert tower.image_processor.crop_size["height"] == 56
    images = torch.randn(2, 3, 56, 56)
    features = tower(images)
    assert features.shape == (2, 16, 32)
    assert torch.equal(features, delayed(images))
    assert torch.equal(features, tower.feature_select(tower.vision_tower(images, output_hidden_states=True)))
    assert [part.shape for part in tower(list(images))] == [(1, 16, 32)] * 2
    assert torch.equal(build_vision_tower(SimpleNamespace(mm_vision_tower=directory, **vars(args)))(images), features)
    assert (tower.dtype, tower.device.type, tower.dummy_feature.shape) == (torch.float32, "cpu", (1, 32))


def test_identity_map_and_projector_arguments() -> None:
    x = torch.randn(2, 3)
    assert IdentityMap()(x, "anything", more=1) is x
    assert IdentityMap().config == {"mm_projector_type": "identity"}
    config = SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=4, hidden_size=6)
    assert isinstance(build_vision_projector(config, delay_load=True), nn.Sequential)


def test_a_core_of_a_fork_inherits_its_vision_modules(tiny_dirs: dict[str, Path]) -> None:
    class ForkModel(LlavaMetaModel, LlamaModel):
        config_class = LlavaConfig

        def __init__(self, config: LlavaConfig) -> None:
            super().__init__(config)

    model = ForkModel(LlavaConfig.from_pretrained(tiny_dirs["chat"]))
    assert model.get_vision_tower() is not None and isinstance(model.mm_projector, nn.Sequential)


@pytest.fixture(scope="module")
def chat(tiny_dirs: dict[str, Path]) -> LlavaLlamaForCausalLM:
    model: LlavaLlamaForCausalLM = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]
    return model


NEWER: list[dict[str, Any]] = [
    {"image_sizes": [(640, 480)]},
    {"image_sizes": [(640, 480)], "modalities": ["image"]},
    {"image_sizes": torch.tensor([[640, 480]]), "modalities": None},
]


@torch.no_grad()
@pytest.mark.parametrize("arguments", NEWER)
def test_arguments_of_newer_callers_change_nothing(chat: LlavaLlamaForCausalLM, arguments: dict[str, Any]) -> None:
    """Except that the ids of the prompt are not returned, as these callers expect."""
    ids, images = torch.tensor([[1, -200, 300, 301]]), torch.randn(1, 3, 56, 56)
    assert torch.equal(chat(ids, images=images, **arguments).logits, chat(ids, images=images).logits)
    mask = torch.ones_like(ids)
    plain = chat.generate(ids, images=images, do_sample=False, max_new_tokens=6)[:, ids.shape[1] :]
    newer = chat.generate(inputs=ids, attention_mask=mask, images=images, do_sample=False, max_new_tokens=6,
                          use_cache=True, pad_token_id=0, **arguments)  # fmt: skip
    assert torch.equal(plain, newer)
    beams = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(chat.generate(ids, images=images, **beams)[:, ids.shape[1] :],
                       chat.generate(ids, images=images, **beams, **arguments))  # fmt: skip
    first = chat.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images)
    second = chat.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images, arguments["image_sizes"])
    assert first[4] is not None and second[4] is not None and torch.equal(first[4], second[4])


def test_auto_upgrade(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    old = shutil.copytree(tiny_dirs["chat"], tmp_path / "llava-old")
    edit_config(old, model_type="llava", architectures=["LlavaLlamaForCausalLMOld"])
    auto_upgrade(str(old))
    assert isinstance(AutoConfig.from_pretrained(old), LlavaConfig)
    assert json.loads((old / "config.json").read_text())["architectures"] == ["LlavaLlamaForCausalLM"]
    base = shutil.copytree(tiny_dirs["base"], tmp_path / "llava-base")
    auto_upgrade(base)
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
