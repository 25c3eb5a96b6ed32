"""Packed training equals transformers' computation over the padded batch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import (
    LLAMA_ATTENTION_CLASSES,
    LlamaFlashAttention2,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaSdpaAttention,
)

from llava.errors import RequestError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.packed import PackedBatch, attend

ROW = st.tuples(st.integers(1, 30), st.integers(0, 2))  # words, images


@pytest.fixture(scope="module")
def models(tiny_dirs: dict[str, Path]) -> dict[str, LlavaLlamaForCausalLM]:
    found = {}
    for attention in ("eager", "sdpa"):
        model = load_pretrained_model(tiny_dirs["chat"], device="cpu", attn_implementation=attention)[1].train()
        model.config.use_cache = False
        found[attention] = model
    return found


def batch_of(rows: list[tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = max(words + images for words, images in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (words, images) in enumerate(rows):
        real = torch.randint(3, 384, (words + images,), generator=generator)
        real[torch.randperm(words + images, generator=generator)[:images]] = -200
        ids[row, : len(real)] = real
        taught = (torch.rand(len(real), generator=generator) < 0.4) & (real != -200)
        labels[row, : len(real)] = torch.where(taught, real, -100)
    lengths = torch.tensor([sum(row) for row in rows])
    slots = sum(max(1, images) for _, images in rows)
    pixels = torch.randn(slots, 3, 56, 56, generator=generator)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.arange(length) < lengths[:, None],
        "images": pixels,
    }


def padded_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss by the library's layers, over the padded batch with its masks."""
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    loss: torch.Tensor = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels).loss
    return loss


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@given(rows=st.lists(ROW, min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradients_equal_the_padded_batch(
    models: dict[str, LlavaLlamaForCausalLM], attention: str, rows: list[tuple[int, int]], seed: int
) -> None:
    model, batch = models[attention], batch_of(rows, seed)
    packed, padded = model(**batch).loss, padded_loss(model, batch)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, packed), gradients(model, padded)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu"}, {"pretraining_tp": 2}])
@pytest.mark.parametrize(("library", "name"), [(LlamaMLP, "mlp"), (LlamaRMSNorm, "input_layernorm")])
def test_a_part_learns_as_the_librarys(library: type[torch.nn.Module], name: str, settings: dict[str, Any]) -> None:
    config = LlavaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, **settings
    )
    ours = getattr(LlavaLlamaForCausalLM(config).model.layers[0], name).train()
    theirs = library(config if library is LlamaMLP else config.hidden_size).train()
    theirs.load_state_dict(ours.state_dict())
    assert type(ours) is not library
    x, toward = torch.randn(2, 1, 5, 8).unbind()
    found = []
    for part, batch in ((ours, x[0].clone()), (theirs, x.clone())):
        out = part(batch.requires_grad_())
        out.backward(toward.view_as(out))
        found.append([value.view(-1, 8) for value in (out, batch.grad)] + [w.grad for w in part.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", ["norm", "proj", "mlp", "down_proj", "q_proj", "layers.0"])
def test_frozen_parts_change_no_other_gradient(models: dict[str, LlavaLlamaForCausalLM], frozen: str) -> None:
    model, batch = models["sdpa"], batch_of([(9, 1), (4, 0)], 7)
    whole = gradients(model, model(**batch).loss)
    parts = [parameter for name, parameter in model.named_parameters() if frozen in name]
    for parameter in parts:
        parameter.requires_grad_(False)
    try:
        rest = gradients(model, model(**batch).loss)
    finally:
        for parameter in parts:
            parameter.requires_grad_(True)
    assert rest.keys() == {name for name in whole if frozen not in name}
    for name, gradient in rest.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-7, rtol=1e-6)


def test_hooks_of_layers_are_called(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    model, batch = models["sdpa"], batch_of([(9, 1), (4, 0)], 8)
    layer = model.model.layers[1]
    plain = gradients(model, model(**batch).loss)
    called: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, part in layer.named_modules()
        if name in ("self_attn.k_proj", "mlp", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
    ]
    try:
        hooked = gradients(model, model(**batch).loss)
    finally:
        for hook in hooks:
            hook.remove()
    assert called == ["input_layernorm", "self_attn.k_proj", "post_attention_layernorm", "mlp.up_proj", "mlp"]
    for name, gradient in plain.items():
        torch.testing.assert_close(hooked[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("supervised", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_computes_the_supervised_tokens_only(
    models: dict[str, LlavaLlamaForCausalLM], supervised: int, checkpointing: bool
) -> None:
    """All tokens without a supervised one: adapters and quantized layers need not take an empty batch."""
    model, batch = models["eager"], batch_of([(9, 0), (4, 0)], 8)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][0, 4 : 4 + supervised] = 7
    sizes: list[list[int]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda _, given, out, size=size: size.append(len(given[0])))
        for layer, size in zip(model.model.layers, sizes, strict=True)
    ]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        model(**batch).loss.backward()
    finally:
        model.gradient_checkpointing_disable()
        for hook in hooks:
            hook.remove()
    assert [size[0] for size in sizes] == [13] * (len(sizes) - 1) + [supervised or 13]


def test_weights_of_another_dtype_are_refused(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    model, batch = models["sdpa"], batch_of([(4, 1)], 9)
    layer = model.model.layers[0].mlp.up_proj.bfloat16()
    try:
        with pytest.raises(RuntimeError, match="dtype"):
            model(**batch)
    finally:
        layer.float()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layers_keep_little_for_their_backward_pass(
    models: dict[str, LlavaLlamaForCausalLM], dtype: torch.dtype | None
) -> None:
    """Saved: inputs of norms; queries, keys, values and output of attention; gate and up. Not: what they turn into."""
    model = models["sdpa"]
    config, batch = model.config, PackedBatch([24, 24], torch.device("cpu"))
    x = torch.randn(48, config.hidden_size, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.shape[:1] != (1,):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layer = model.model.layers[0]
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    with torch.autocast("cpu", dtype or torch.float32, enabled=dtype is not None):
        rotary = {part.untyped_storage().data_ptr() for part in batch.rotary(layer.self_attn.rotary_emb, x.to(dtype))}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(x, batch)[0]
    assert out.requires_grad
    size = 4 if dtype is None else 2
    tokens, heads = len(x), config.num_attention_heads
    expected = {
        "inputs": 2 * 4 * config.hidden_size,
        "queries, repeated keys and values, output": size * 4 * config.hidden_size,
        "gate, up": 2 * size * config.intermediate_size,
        "numbers per token": 4 * (2 + heads),
    }
    # under autocast the output projection also keeps its weight in 16 bits
    cast = size * config.hidden_size**2 if dtype else 0
    found = sum(bytes_ for pointer, bytes_ in kept.items() if pointer not in weights | rotary)
    assert found == tokens * sum(expected.values()) + cast


def test_rows_on_the_left_of_their_padding_or_the_right_are_the_same(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    model, batch = models["sdpa"], batch_of([(9, 1), (4, 0)], 3)
    flipped = {name: value.clone() for name, value in batch.items()}
    for name in ("input_ids", "labels", "attention_mask"):
        flipped[name][1] = batch[name][1].roll(6)
    assert flipped["attention_mask"][1].tolist() == [False] * 6 + [True] * 4
    torch.testing.assert_close(model(**flipped).loss, model(**batch).loss)


def test_gradient_checkpointing_changes_nothing(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    model, batch = models["eager"], batch_of([(12, 1), (5, 0), (20, 2)], 4)
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        again = gradients(model, model(**batch).loss)
    finally:
        model.gradient_checkpointing_disable()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_half_precision_products_stay_close_to_the_library(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    model, batch = models["eager"], batch_of([(25, 1), (10, 0), (24, 2)], 5)
    with torch.autocast("cpu", torch.bfloat16):
        packed, padded = model(**batch).loss, padded_loss(model, batch)
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, padded, atol=0.02, rtol=0.0)


def test_a_placeholder_without_image_is_refused(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    batch = batch_of([(4, 1)], 6) | {"images": None}
    with pytest.raises(RequestError, match="no image was given"):
        models["sdpa"](**batch)


@pytest.mark.parametrize(("rows", "encoded"), [([(5, 0), (4, 1), (6, 0), (3, 2)], 3), ([(5, 0), (4, 0)], 1)])
def test_images_that_no_text_shows_are_not_computed(
    models: dict[str, LlavaLlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[int, int]],
    encoded: int,
) -> None:
    """One of them is, where there are no others: every rank must run tower and projector."""
    model, counts = models["sdpa"], []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: (counts.append(len(images)), encode(images))[1])
    gradients(model, model(**batch_of(rows, 8)).loss)
    assert counts == [encoded]
    assert model.model.mm_projector[0].weight.grad is not None


def test_what_only_the_padded_batch_has_is_still_given(models: dict[str, LlavaLlamaForCausalLM]) -> None:
    model, batch = models["sdpa"], batch_of([(5, 1), (4, 0)], 9)
    asked = model(**batch, output_hidden_states=True)
    assert len(asked.hidden_states) == len(model.model.layers) + 1
    assert isinstance(model(**batch, return_dict=False), tuple)
    torch.testing.assert_close(asked.loss, model(**batch).loss)


def test_rows_of_similar_length_share_an_attention_call() -> None:
    batch = PackedBatch([10, 3, 9, 8], torch.device("cpu"))
    assert [(group.count, group.length) for group in batch.groups] == [(3, 10), (1, 3)]
    tokens = torch.arange(30)
    assert batch.pad_index[batch.unpad_index].tolist() == tokens.tolist()
    assert not PackedBatch([7, 7], torch.device("cpu")).padded


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_within_a_call_gets_and_gives_no_gradient(attention: str) -> None:
    lengths = [10, 3, 9, 8]
    batch = PackedBatch(lengths, torch.device("cpu"))
    kind = LLAMA_ATTENTION_CLASSES[attention]
    parts = [torch.randn(sum(lengths), heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(sum(lengths), 4, 4)  # also at the last tokens, which no loss reads
    alone = [
        attend(*rows, PackedBatch([len(rows[0])], torch.device("cpu")), kind)
        for rows in zip(*(part.split(lengths) for part in parts))
    ]
    wanted = torch.autograd.grad((torch.cat(alone) * weights).sum(), parts)
    found = torch.autograd.grad((attend(*parts, batch, kind) * weights).sum(), parts)
    torch.testing.assert_close(found, wanted)


def test_flash_attention_gets_the_rows_by_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn needs a GPU; a stand-in with its signature checks the arguments."""

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: torch.Tensor,
        _: torch.Tensor,
        *longest: int,
        **kw: Any,
    ) -> torch.Tensor:
        assert kw == {"dropout_p": 0.0, "causal": True}
        assert longest == (6, 6)
        assert starts.dtype == torch.int32
        pieces = []
        for start, end in zip(starts.tolist(), starts.tolist()[1:]):
            row = [
                part[start:end].transpose(0, 1) for part in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
            ]
            pieces.append(torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1))
        return torch.cat(pieces)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    batch = PackedBatch([6, 3], torch.device("cpu"))
    flash, sdpa = (attend(q, k, v, batch, kind) for kind in (LlamaFlashAttention2, LlamaSdpaAttention))
    torch.testing.assert_close(flash, sdpa)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_drops_in_training_alone(models: dict[str, LlavaLlamaForCausalLM], attention: str) -> None:
    model, batch = models[attention], batch_of([(12, 0)], 7)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    try:
        first, second = model(**batch).loss, model(**batch).loss
    finally:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
    assert first != second
    assert model(**batch).loss == model(**batch).loss
