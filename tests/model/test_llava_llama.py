"""The chat model: loss, cached and batched generation, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, DynamicCache

from llava.errors import ConfigError, RequestError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from tests import tiny


@pytest.fixture(scope="module")
def model(tiny_dirs: dict[str, Path]) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(count))


def alone(model: LlavaLlamaForCausalLM, row: list[int], images: torch.Tensor | None, **kw: Any) -> list[int]:
    out = model.generate(torch.tensor([row]), images=images, do_sample=False, max_new_tokens=6, **kw)
    return [int(token) for token in out[0, len(row) :]]


def test_logits_at_labels_give_the_same_loss_and_gradients(tiny_dirs: dict[str, Path]) -> None:
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]
    ids = torch.tensor([[1, -200, 5, 6, 7], [1, 8, 9, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 8, 9, -100, -100]])
    kw = {"attention_mask": ids != 0, "labels": labels, "images": pixels(2)}
    results = []
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        out = model(ids, **kw)
        out.loss.backward()
        results.append((out, model.lm_head.weight.grad.clone(), model.model.mm_projector[0].weight.grad.clone()))
    (full, *full_grads), (sparse, *sparse_grads) = results
    assert full.logits.shape == (2, 20, 384)
    assert sparse.logits is None
    torch.testing.assert_close(full.loss, sparse.loss)
    for a, b in zip(full_grads, sparse_grads):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None or not p.grad.abs().sum() for p in model.model.vision_tower.parameters())


def test_nothing_supervised_is_zero_loss_not_nan(tiny_dirs: dict[str, Path]) -> None:
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]
    ids = torch.tensor([[1, -200, 5]])
    for training in (False, True):
        loss = model.train(training)(ids, labels=torch.full_like(ids, -100), images=pixels(1)).loss
        loss.backward()
        assert loss.item() == 0.0
    assert torch.isfinite(model.lm_head.weight.grad).all()


def test_a_dummy_slot_changes_neither_loss_nor_gradients(tiny_dirs: dict[str, Path]) -> None:
    """Text-only ranks bring a zeros image so that ZeRO-3 collectives match (Z3-1): the numbers must not notice."""
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1].train()
    ids = torch.tensor([[1, 5, 6, 7]])
    results = []
    for images in (None, torch.zeros(1, 3, 56, 56)):
        model.zero_grad()
        loss = model(ids, labels=ids, images=images).loss
        loss.backward()
        results.append((loss, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    projector = model.model.mm_projector[0].weight.grad
    assert projector is not None
    assert not projector.abs().sum()


@pytest.mark.parametrize("style", ["tuple", "dynamic", "none"])
def test_cache_styles_agree(model: LlavaLlamaForCausalLM, style: str) -> None:
    row = [1, 5, -200, 7, 8]
    kw: dict[str, Any] = {"dynamic": {"past_key_values": DynamicCache()}, "none": {"use_cache": False}}.get(style, {})
    assert alone(model, row, pixels(1), **kw) == alone(model, row, pixels(1))


def test_cached_second_turn_equals_one_prefill(model: LlavaLlamaForCausalLM) -> None:
    """A later chunk may bring text or another image; what it attends to is the same as in one long prompt."""
    first, second = [1, 5, -200, 7], [9, -200, 11]
    images = pixels(2)
    with torch.no_grad():
        whole = model(torch.tensor([first + second]), images=images).logits
        head = model(torch.tensor([first]), images=images[:1], use_cache=True)
        tail = model(torch.tensor([second]), images=images[1:], past_key_values=head.past_key_values, use_cache=True)
        text = model(torch.tensor([[12, 13]]), images=images[1:], past_key_values=tail.past_key_values)
        longer = model(torch.tensor([[*first, *second, 12, 13]]), images=images).logits
    torch.testing.assert_close(tail.logits, whole[:, -tail.logits.shape[1] :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.logits, longer[:, -2:], atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.one_of(st.integers(3, 300), st.just(-200)), min_size=1, max_size=9), min_size=2, max_size=4
    ),
    side=st.sampled_from(["left", "right"]),
)
def test_batched_generate_equals_each_row_alone(tiny_dirs: dict[str, Path], rows: list[list[int]], side: str) -> None:
    """Whatever side the prompts are padded on and however many images each has."""
    model = load_once(tiny_dirs["chat"])
    rows = [[1, *row] for row in rows]
    images = pixels(sum(max(1, row.count(-200)) for row in rows))
    width = max(map(len, rows))
    padded = [(row + [0] * (width - len(row))) if side == "right" else ([0] * (width - len(row)) + row) for row in rows]
    ids = torch.tensor(padded)
    together = model.generate(ids, attention_mask=(ids != 0).long(), images=images, do_sample=False, max_new_tokens=5,
                              eos_token_id=-1, pad_token_id=0)  # fmt: skip
    used = 0
    for b, row in enumerate(rows):
        own = images[used : used + max(1, row.count(-200))]
        used += len(own)
        single = model.generate(torch.tensor([row]), images=own, do_sample=False, max_new_tokens=5, eos_token_id=-1)
        assert together[b, width:].tolist() == single[0, len(row) :].tolist()


_loaded: dict[Path, LlavaLlamaForCausalLM] = {}


def load_once(path: Path) -> LlavaLlamaForCausalLM:
    if path not in _loaded:
        _loaded[path] = load_pretrained_model(path, device="cpu")[1]
    return _loaded[path]


def test_beam_search_runs(model: LlavaLlamaForCausalLM) -> None:
    out = model.generate(torch.tensor([[1, -200, 5]]), images=pixels(1), num_beams=2, do_sample=False, max_new_tokens=3)
    assert out.shape[1] <= 6


def test_faults_are_told_in_one_sentence(model: LlavaLlamaForCausalLM) -> None:
    with pytest.raises(RequestError, match="no image was given"):
        model(torch.tensor([[1, -200]]))
    with pytest.raises(RequestError, match="2 image slots"):
        model(torch.tensor([[1, -200, -200]]), images=pixels(1))
    with pytest.raises(RequestError, match="2 <image> placeholders, but 1"):
        model.embed_prompt(torch.tensor([-200, -200]), [torch.zeros(2, 48)])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_start_and_end_tokens_learn_only_beside_an_image(tiny_dirs: dict[str, Path]) -> None:
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1].train()
    model.config.tune_mm_mlp_adapter = model.config.mm_use_im_start_end = True
    model.get_input_embeddings().requires_grad_(True)
    ids = torch.tensor([[1, 20, -200, 21, 30, 31]])
    out = model(ids, labels=torch.tensor([[-100, -100, -100, -100, 30, 31]]), images=pixels(1))
    out.loss.backward()
    touched = model.get_input_embeddings().weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [20, 21]


def test_save_is_complete_and_reloads(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The tower runs 3 of its 6 layers; the saved checkpoint holds all 6, as published ones do."""
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]
    assert len(model.model.vision_tower.vision_tower.encoder.layers) == 3
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    tower = {name.removeprefix("model.vision_tower.vision_tower."): w for name, w in saved.items() if "tower" in name}
    stock = load_file(tiny_dirs["tower"] / "model.safetensors")
    assert tower.keys() == stock.keys()
    assert all(torch.equal(tower[name], stock[name]) for name in stock)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]


def test_the_config_class_reads_old_names_only(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    settings = json.loads((tiny_dirs["chat"] / "config.json").read_text())
    for name in ("llava", "llama", "llava_llama"):
        (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": name}))
        assert LlavaConfig.from_pretrained(tmp_path).model_type == "llava_llama"
    assert isinstance(AutoConfig.from_pretrained(tiny_dirs["chat"]), LlavaConfig)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "mistral"}))
    with pytest.raises(ConfigError, match="mistral"):
        LlavaConfig.from_pretrained(tmp_path)


def test_tiny_models_are_reproducible(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    again = tiny.make_base(tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.model"):
        assert (again / name).read_bytes() == (tiny_dirs["base"] / name).read_bytes()
