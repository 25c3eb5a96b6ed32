"""InternViT against its formulas, written out (arXiv:2312.14238)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from llava.errors import ConfigError
from llava.model.multimodal_encoder import intern_vit_6b
from llava.model.multimodal_encoder.intern_vit_6b import (
    DropPath,
    InternAttention,
    InternRMSNorm,
    InternVisionConfig,
    InternVisionModel,
    resample_positions,
)
from llava.model.weights import empty_weights


def small(**overrides: object) -> InternVisionConfig:
    settings = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}
    return InternVisionConfig(**{**settings, "image_size": 56, **overrides})


@pytest.fixture
def model() -> InternVisionModel:
    torch.manual_seed(0)
    return InternVisionModel(small()).eval()


def test_keys_and_shapes() -> None:
    for qkv_bias, qk_norm, per_layer in ((False, True, 13), (True, True, 14), (False, False, 11)):
        state = InternVisionModel(small(qkv_bias=qkv_bias, qk_normalization=qk_norm)).state_dict()
        assert len(state) == 4 + 3 * per_layer
    assert state["embeddings.position_embedding"].shape == (1, 17, 32)
    assert state["encoder.layers.2.attn.qkv.weight"].shape == (96, 32)
    assert state["encoder.layers.0.ls1"].shape == (32,)


@pytest.mark.parametrize(
    ("layers", "image_size", "parameters"),
    [(48, 224, 5_902_793_600), (48, 448, 5_905_251_200), (45, 448, 5_536_496_000)],
)
def test_published_sizes(layers: int, image_size: int, parameters: int) -> None:
    with empty_weights():
        model = InternVisionModel(InternVisionConfig(num_hidden_layers=layers, image_size=image_size))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == 4 + 13 * layers


def by_hand(model: InternVisionModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Every hidden state, from the formulas, with explicit softmax and per-element norms."""
    weights = model.state_dict()
    config = model.config

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.layer_norm_eps))

    patch = torch.nn.functional.conv2d(
        pixels, weights["embeddings.patch_embedding.weight"], weights["embeddings.patch_embedding.bias"], stride=14
    )
    batch, width = pixels.shape[0], config.hidden_size
    x = torch.cat([weights["embeddings.class_embedding"].expand(batch, 1, width), patch.flatten(2).mT], 1)
    x = x + weights["embeddings.position_embedding"]
    states = [x]
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"encoder.layers.{i}."): v for k, v in weights.items() if f"layers.{i}." in k}
        qkv = rms(x, w["norm1.weight"]) @ w["attn.qkv.weight"].T
        q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
        q, k = rms(q, w["attn.q_norm.weight"]), rms(k, w["attn.k_norm.weight"])
        heads = []
        for h in range(config.num_attention_heads):
            part = slice(h * 16, (h + 1) * 16)
            scores = q[..., part] @ k[..., part].mT * 16**-0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + (torch.cat(heads, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]) * w["ls1"]
        hidden = torch.nn.functional.gelu(rms(x, w["norm2.weight"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + (hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]) * w["ls2"]
        states.append(x)
    return states


@torch.no_grad()
def test_forward_equals_the_formulas(model: InternVisionModel) -> None:
    for parameter in model.parameters():
        parameter.normal_(0.5, 0.3)
    pixels = torch.randn(2, 3, 56, 56)
    output = model(pixels, output_hidden_states=True)
    expected = by_hand(model, pixels)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for got, want in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert torch.equal(model(pixels, return_dict=False)[0], output.last_hidden_state)
    embeds = model.embeddings(pixels)
    assert torch.equal(model(pixel_embeds=embeds).last_hidden_state, output.last_hidden_state)


@torch.no_grad()
def test_qk_norm_is_over_all_heads_together() -> None:
    attention = InternAttention(small()).eval()
    attention.qkv.weight[:16] *= 10  # the first head's queries are ten times larger; per-head norms would hide it
    x = torch.randn(1, 5, 32)
    q = attention.qkv(x)[..., :32]
    normed = attention.q_norm(q)
    assert normed[..., :16].norm() > 3 * normed[..., 16:].norm()
    torch.testing.assert_close(normed.pow(2).mean(-1), torch.ones(1, 5), atol=1e-3, rtol=0)


def test_norm_casts_before_the_product() -> None:
    norm = InternRMSNorm(8, eps=1e-6)
    assert norm(torch.randn(2, 8, dtype=torch.bfloat16)).dtype is torch.float32
    half = norm.to(torch.bfloat16)
    torch.nn.init.constant_(half.weight, 1.0078125)
    x = torch.randn(2, 8).to(torch.bfloat16)
    rms = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
    assert torch.equal(half(x), half.weight * rms)


@settings(max_examples=20, deadline=None)
@given(grid=st.integers(2, 5), height=st.integers(1, 7), width=st.integers(1, 7))
def test_resampling(grid: int, height: int, width: int) -> None:
    table = torch.randn(1, 1 + grid * grid, 6)
    out = resample_positions(table, height, width)
    assert out.shape == (1, 1 + height * width, 6)
    assert torch.equal(out[:, 0], table[:, 0])
    if (height, width) == (grid, grid):
        assert torch.equal(out, table)
    image = table[:, 1:].reshape(1, grid, grid, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", align_corners=False)
    torch.testing.assert_close(out[:, 1:], want.flatten(2).mT)


def test_resampling_refuses_a_table_that_is_not_square() -> None:
    with pytest.raises(ValueError, match="square grid"):
        resample_positions(torch.zeros(1, 12, 4), 2, 2)


@torch.no_grad()
def test_input_sizes(model: InternVisionModel) -> None:
    assert model(torch.randn(1, 3, 60, 60)).last_hidden_state.shape[1] == 17  # the remainder of 60 / 14 is lost
    assert model(torch.randn(1, 3, 28, 84)).last_hidden_state.shape[1] == 13
    with pytest.raises(ValueError, match="pixel_values"):
        model(torch.randn(3, 56, 56))
    with pytest.raises(ValueError, match="pixel_values or pixel_embeds"):
        model()


@torch.no_grad()
def test_resize_pos_embeddings_updates_the_native_size(model: InternVisionModel) -> None:
    pixels = torch.randn(1, 3, 84, 84)
    before = model(pixels).last_hidden_state
    model.resize_pos_embeddings(56, 84, 14)
    assert model.config.image_size == 84
    assert model.embeddings.position_embedding.shape[1] == 37
    torch.testing.assert_close(model(pixels).last_hidden_state, before)
    with pytest.raises(ValueError, match="rows"):
        model.resize_pos_embeddings(56, 84, 14)


def test_drop_path_keeps_the_mean_and_acts_in_training_only() -> None:
    drop = DropPath(0.5)
    x = torch.ones(2000, 3)
    assert torch.equal(drop.eval()(x), x)
    out = drop.train()(x)
    assert set(out.flatten().tolist()) == {0.0, 2.0}
    assert out.mean() == pytest.approx(1.0, abs=0.1)


def test_gradient_checkpointing_changes_nothing(model: InternVisionModel) -> None:
    pixels = torch.randn(1, 3, 56, 56)
    gradients = []
    for checkpointing in (False, True):
        model.encoder.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(pixels).last_hidden_state.sum().backward()
        gradients.append(model.embeddings.position_embedding.grad.clone())
    torch.testing.assert_close(*gradients)


def test_configuration_refuses_what_its_weights_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=5"):
        small(num_attention_heads=5)
    with pytest.raises(ConfigError, match="InternViT-300M"):
        small(norm_type="layer_norm")
    PretrainedConfig(hidden_size=7).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="bert"):
        InternVisionConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "internvl", "vision_config": {"model_type": "intern_vit_6b", "num_hidden_layers": 45}}'
    )
    assert InternVisionConfig.from_pretrained(tmp_path).num_hidden_layers == 45


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_positions_of_a_frozen_table_are_resampled_once_per_change(
    model: InternVisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return resample_positions(*args)

    monkeypatch.setattr(intern_vit_6b, "resample_positions", counted)
    embeddings, pixels = model.embeddings, torch.randn(1, 3, 84, 84)
    model(pixels)
    model(pixels)
    assert len(calls) == 2  # the table is trainable
    model.requires_grad_(False)
    with torch.inference_mode():
        first = model(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, first)
    assert len(calls) == 3
    assert not embeddings.positions(6, 6).is_inference()
    for change in (
        lambda: embeddings.position_embedding.add_(1),
        lambda: embeddings.load_state_dict({name: weight + 1 for name, weight in embeddings.state_dict().items()}),
        lambda: setattr(embeddings.position_embedding, "data", embeddings.position_embedding + 1),
        lambda: model.double(),
    ):
        change()
        table = embeddings.position_embedding
        assert torch.equal(embeddings.positions(6, 6), resample_positions(table, 6, 6))
        assert embeddings.positions(5, 6).shape[1] == 31
    assert torch.equal(embeddings.positions(4, 4), embeddings.position_embedding)


@pytest.mark.parametrize("grid", [(4, 9, 9), (16, 24, 24), (24, 16, 16), (5, 3, 8), (1, 4, 2), (16, 17, 1), (7, 2, 7)])
def test_tuned_positions_are_resampled_without_the_backward_of_interpolation(
    deterministic: None, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int, int]
) -> None:
    """That backward raises on CUDA under deterministic algorithms. Forward and gradient are those of interpolation."""
    size, height, width = grid
    table = torch.randn(1, 1 + size**2, 6, requires_grad=True)
    toward = torch.randn(1, 1 + height * width, 6)
    interpolate = torch.nn.functional.interpolate

    patches = table[:, 1:].reshape(1, size, size, 6).permute(0, 3, 1, 2)
    patches = interpolate(patches, size=(height, width), mode="bicubic", align_corners=False)
    want = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    want.backward(toward)
    want_gradient, table.grad = table.grad, None

    def forward_only(points: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert not (points.requires_grad and torch.is_grad_enabled())
        return interpolate(points, **settings)

    monkeypatch.setattr(torch.nn.functional, "interpolate", forward_only)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the product
        found = resample_positions(table, height, width)
    found.backward(toward)
    torch.testing.assert_close(found, want, atol=2e-6, rtol=1e-5)
    assert table.grad is not None
    torch.testing.assert_close(table.grad, want_gradient, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(resample_positions(table, height, width), want)
