"""`LlamaRunner` computes the logits of transformers' forward; unsupported models use that forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava.engine import attention
from llava.engine.attention import SharedPrefix, attend
from llava.engine.cache import KVCache, ShardedKV
from llava.engine.layers import FusedLinear
from llava.engine.llama import LlamaRunner, build_model_runner
from llava.engine.model_runner import ModelRunner
from llava.engine.prefix_cache import PrefixCache, PrefixMatch
from llava.placement import prefers_matrix_vector
from tests.tiny import llama_settings

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "all heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "gelu": {"hidden_act": "gelu"},
}


def make_model(**overrides: Any) -> Any:
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(**llama_settings(**{"initializer_range": 0.2, "hidden_size": 64, **overrides}))
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.7, 1.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_logits_equal_transformers(variant: str) -> None:
    """Rows of different lengths, with and without a shared prefix, then decode steps with all of them."""
    model = make_model(**VARIANTS[variant])
    begin, tails = list(range(3, 43)), [[50, 51, 52], [60], [70, 71, 72, 73, 74]]
    rows = [[*begin, *tails[0]], [*begin, *tails[1]], tails[2]]
    expected = [model(torch.tensor([row])).logits[0, -1] for row in rows]
    runner = build_model_runner(model)
    assert isinstance(runner, LlamaRunner)
    node = PrefixCache(2**20).insert((), tuple(begin), [1] * 40, runner.prefill_kv(runner.embed(begin), ()))
    prefixes = [(PrefixMatch(node, 40),), (PrefixMatch(node, 40),), ()]
    data, states = runner.prefill([runner.embed(tail) for tail in tails], prefixes)
    torch.testing.assert_close(runner.logits(states), torch.stack(expected), atol=2e-4, rtol=1e-4)
    cache = KVCache(runner.spec)
    cache.join(data, [3, 1, 5], prefixes)
    for step in range(3):
        new = [100 + step, 110 + step, 120 + step]
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        expected = [model(torch.tensor([row])).logits[0, -1] for row in rows]
        torch.testing.assert_close(runner.decode(new, cache), torch.stack(expected), atol=2e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_attention_in_parts_equals_attention_over_all(data: st.DataObject) -> None:
    """With the CPU kernel, and with materialised scores, as on other devices, a few heads at a time."""
    rows, kv_heads, queries, width = (data.draw(st.integers(1, top)) for top in (4, 3, 4, 5))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(rows, kv_heads, queries, 8)
    own = torch.randn(2, rows, kv_heads, width, 8)
    lengths = [data.draw(st.integers(1, width)) for _ in range(rows)]
    mask = torch.zeros(rows, 1, 1, width)
    for row, length in enumerate(lengths):
        mask[row, ..., length:] = -torch.inf
    members = [row for row in range(rows) if data.draw(st.booleans())] or [0]
    part = torch.randn(1, 2, kv_heads, data.draw(st.integers(1, 6)), 8)
    shared = [SharedPrefix(torch.tensor(members), part)]
    causal = queries == width and data.draw(st.booleans())
    lengths = [width] * rows if causal else lengths
    given = (query, own[0], own[1], None if causal else mask, shared, 0)
    got = attend(*given, causal=causal)
    with mock.patch.multiple(attention, _cpu_flash=None, _SCORES=40):
        torch.testing.assert_close(attend(*given, causal=causal), got)
    for row, length in enumerate(lengths):
        keys, values = own[:, row, :, :length]
        if row in members:
            keys, values = torch.cat([part[0, 0], keys], 1), torch.cat([part[0, 1], values], 1)
        scores = query[row] @ keys.transpose(-1, -2) / 8**0.5
        if causal:
            scores[..., -width:] += torch.full((width, width), -torch.inf).triu(1)
        want = torch.softmax(scores, -1) @ values
        torch.testing.assert_close(got[row], want)


@torch.inference_mode()
def test_layers_on_several_devices_decode_as_on_one() -> None:
    whole, split = (LlamaRunner(make_model()) for _ in range(2))
    half = split.spec.layers // 2
    devices = [torch.device("cpu")] * half + [torch.device("cpu", 0)] * (split.spec.layers - half)
    split.spec = replace(split.spec, layer_devices=tuple(devices))
    found = []
    for runner in (whole, split):
        runner.native = None
        cache = KVCache(runner.spec)
        data, _ = runner.prefill([runner.embed([5, 6, 7]), runner.embed([8, 9])], [(), ()])
        cache.join(data, [3, 2], [(), ()])
        found.append([runner.decode([10 + step, 20 + step], cache) for step in range(3)])
    assert isinstance(cache.data, ShardedKV)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="in one layer"):
        cache.data[0, 0] = 0.0


def test_unsupported_models_use_the_forward_of_transformers() -> None:
    eager = make_model(attn_implementation="eager")
    assert type(build_model_runner(eager)) is ModelRunner
    hooked = make_model()
    hooked.model.layers[1]._hf_hook = object()
    assert type(build_model_runner(hooked)) is ModelRunner


def test_fused_weights_share_memory_and_can_be_saved(tmp_path: Path) -> None:
    model = make_model(attention_bias=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = LlamaRunner(model), LlamaRunner(model)
    attention = model.model.layers[0].self_attn
    assert first.layers[0].qkv.weight is not None and second.layers[0].qkv.weight is not None
    assert first.layers[0].qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()
    assert second.layers[0].qkv.weight.data_ptr() == first.layers[0].qkv.weight.data_ptr()  # no second copy
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_quantized_layers_are_called_one_by_one() -> None:
    class Packed(torch.nn.Linear):
        """Stands for a layer in 4 or 8 bit."""

    plain, packed = torch.nn.Linear(4, 3), Packed(4, 2)
    x = torch.randn(5, 4)
    both = FusedLinear(plain, packed)
    assert both.weight is None
    torch.testing.assert_close(both(x), torch.cat([plain(x), packed(x)], -1))
    half = FusedLinear(torch.nn.Linear(4, 3).bfloat16(), torch.nn.Linear(4, 2).bfloat16())
    assert half.vector == prefers_matrix_vector(torch.device("cpu"), torch.bfloat16) is True
    torch.testing.assert_close(half(x[:1].bfloat16()), half(x[:2].bfloat16())[:1], atol=0.02, rtol=0.02)
