"""Products on the tiles of Intel AMX: right for every size, and the same for a row whatever its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.engine.cache import KVCache
from llava.engine.features import FeatureEncoder
from llava.engine.llama import LlamaRunner
from llava.engine.lora import LoraWeights
from llava.engine.native import decoder, packed
from llava.engine.native.attention import KVBlock, PromptAttention
from llava.engine.native.build import has_tiles
from llava.engine.native.packed import GATED_SILU, GELU, NONE, QUICK_GELU, TileLinear, plain_part
from llava.engine.prefix_cache import PrefixCache, PrefixMatch
from llava.engine.sequence import hash_image
from llava.engine.tower import TowerRunner
from llava.model.builder import load_pretrained_model
from llava.model.lora_adapter import LoraAdapter
from tests.engine.test_llama import make_model
from tests.engine.test_native import rows_of
from tests.engine.test_packed import dequantize, quantize
from tests.tiny import make_chat, make_clip_tower

pytestmark = pytest.mark.skipif(not has_tiles(), reason="needs AMX and a C++ compiler")
BF16 = torch.bfloat16


def bf16(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(BF16)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, residual: Tensor | None) -> Tensor:
    """In float64."""
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation == GATED_SILU:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    elif activation == QUICK_GELU:
        out = out * torch.sigmoid(1.702 * out)
    elif activation == GELU:
        out = F.gelu(out)
    return out if residual is None else out + residual.double()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
@torch.inference_mode()
def test_linear_layers(data: st.DataObject) -> None:
    """Any numbers of rows and outputs; rows are bitwise independent of how many there are."""
    width, count = 32 * data.draw(st.sampled_from([1, 2, 5, 12, 13, 29])), data.draw(st.integers(1, 70))
    activation = data.draw(st.sampled_from([NONE, QUICK_GELU, GELU, GATED_SILU]))
    outputs = 32 * data.draw(st.integers(1, 3)) if activation == GATED_SILU else data.draw(st.integers(1, 100))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight, x = bf16(generator, outputs, width), bf16(generator, count, width)
    bias = bf16(generator, outputs) if data.draw(st.booleans()) else None
    shape = (count, outputs // 2 if activation == GATED_SILU else outputs)
    residual = bf16(generator, *shape) if data.draw(st.booleans()) else None
    linear = TileLinear.build(plain_part(weight, bias, BF16))
    assert linear is not None
    got, want = linear(x, activation, residual), expected(x, weight, bias, activation, residual)
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2e-3)  # reciprocals and powers are approximate
    first = data.draw(st.integers(1, count))
    assert torch.equal(linear(x[:first], activation, None if residual is None else residual[:first]), got[:first])


@pytest.mark.parametrize("shape", [(2100, 50, 512), (33, 600, 1024)], ids=["weights", "rows"])
@torch.inference_mode()
def test_more_than_is_multiplied_at_a_time(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs, count, width = shape
    weight, x = bf16(generator, outputs, width), bf16(generator, count, width)
    linear = TileLinear.build(plain_part(weight, None, BF16))
    assert linear is not None
    want = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x).double(), want, rtol=2**-7, atol=1e-2)
    assert TileLinear.build(plain_part(weight[:, :48].contiguous(), None, BF16)) is None


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_packed_layers(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(2)
    model = quantize(make_model(intermediate_size=128).to(BF16), bits)
    layer = model.model.layers[0].mlp.gate_proj
    linear = packed.pack_linear(layer)
    assert isinstance(linear, packed.PackedLinear) and linear.tiles is not None
    weight = dequantize(layer).to(BF16)
    x = bf16(generator, 70, 64)
    together = linear(x)
    torch.testing.assert_close(together.double(), x.double() @ weight.double().T, rtol=2**-7, atol=1e-2)
    for count in (1, 2, 16, 33, 64):
        assert torch.equal(linear(x[:count]), together[:count])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
@torch.inference_mode()
def test_attention_of_prompts(data: st.DataObject) -> None:
    """Rows of any lengths, groups of them behind a common prefix, with any number of heads; rows are independent."""
    size, kv_heads, group = (
        16 * data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
    )
    lengths = data.draw(
        st.one_of(
            st.lists(st.integers(1, 70), min_size=1, max_size=3), st.lists(st.integers(1, 9), min_size=9, max_size=30)
        )
    )
    shared, causal = data.draw(st.integers(0, 50)), data.draw(st.booleans())
    behind = [data.draw(st.sampled_from([0, shared // 2, shared, shared, shared])) for _ in lengths]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = bf16(generator, sum(lengths), kv_heads * group, size)
    prefix = bf16(generator, 1, 2, kv_heads, max(shared, 1), size)
    caches = [bf16(generator, 1, 2, kv_heads, length, size) for length in lengths]
    blocks = [
        [*([KVBlock.of(prefix, before)] if before else []), KVBlock.of(cache, length)]
        for cache, length, before in zip(caches, lengths, behind, strict=True)
    ]
    got = PromptAttention(lengths, blocks)(query, kv_heads, size, causal=causal).split(lengths)
    for row, (cache, queries, length) in enumerate(zip(caches, query.split(lengths), lengths, strict=True)):
        before = behind[row]
        both = torch.cat([prefix[..., :before, :], cache], dim=-2)[0].double().repeat_interleave(group, 1)
        seen = torch.ones(length, before + length, dtype=torch.bool).tril(before if causal else before + length)
        want = F.scaled_dot_product_attention(queries.double().transpose(0, 1), *both, attn_mask=seen).transpose(0, 1)
        torch.testing.assert_close(got[row].double(), want.flatten(1), rtol=0.02, atol=0.02)
        alone = PromptAttention([length], [blocks[row]])(queries, kv_heads, size, causal=causal)
        assert torch.equal(alone, got[row])


def decode_again(runner: LlamaRunner, cache: KVCache, count: int) -> Tensor:
    """Logits of a step of the first rows, which is then taken back."""
    for row in range(len(cache.lengths) - 1, count - 1, -1):
        cache.drop(row)
    logits = runner.decode(list(range(100, 100 + count)), cache)
    cache.end -= 1
    cache.lengths = [length - 1 for length in cache.lengths]
    return logits


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 201},
    ],
    ids=["grouped", "widths of half a tile", "one key head"],
)
@torch.inference_mode()
def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(sizes: dict[str, Any]) -> None:
    """All numbers of rows from 33 down to 1, with and without a common prefix; and errors are those of PyTorch."""
    runner = LlamaRunner(make_model(**sizes).to(BF16))
    lengths, behind = [1 + row % 40 for row in range(33)], [row % 5 != 2 for row in range(33)]
    assert runner.native is not None and runner.native.max_rows >= 33
    cache = rows_of(runner, lengths, behind)
    together = decode_again(runner, cache, 33)
    plain, exact = LlamaRunner(runner.model), LlamaRunner(make_model(**sizes))
    plain.native = exact.native = None
    rounded, want = (decode_again(one, rows_of(one, lengths, behind), 33) for one in (plain, exact))
    assert (together - want).square().mean() < 1.1 * (rounded - want).square().mean()
    for count in range(32, 0, -1):
        assert torch.equal(decode_again(runner, cache, count), together[:count]), count


@torch.inference_mode()
def test_a_prompt_alone_has_the_logits_that_it_has_in_a_batch() -> None:
    runner = LlamaRunner(make_model().to(BF16))
    node = PrefixCache(2**20).insert((), tuple(range(40)), [1] * 40, runner.prefill_kv(runner.embed(range(40)), ()))
    rows = [runner.embed(ids) for ids in ([50], [60], [70, 71, 72, 73, 74])]
    prefixes = [(PrefixMatch(node, 40),), (PrefixMatch(node, 20),), ()]
    data, last = runner.prefill(rows, prefixes)
    together = runner.logits(last)
    for row, (embeds, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        alone, states = runner.prefill([embeds], [prefix])
        assert torch.equal(alone[:, :, 0], data[:, :, row, :, : len(embeds)])
        torch.testing.assert_close(runner.logits(states)[0], together[row], rtol=2**-7, atol=0.02)
        if len(embeds) == 1:
            assert torch.equal(runner.logits(states)[0], runner.logits(states.repeat(3, 1))[2])


def adapt(runner: LlamaRunner, generator: torch.Generator) -> None:
    """Give the runner two adapters: of all linear layers, and of some parts of them with another rank."""
    layers = runner.core.get_submodule("layers")
    linear = {f"model.layers.{name}": one for name, one in layers.named_modules() if isinstance(one, torch.nn.Linear)}

    def adapter(name: str, rank: int, ends: tuple[str, ...]) -> LoraAdapter:
        pairs = {
            key: (
                torch.randn(rank, one.in_features, generator=generator) * 0.2,
                torch.randn(one.out_features, rank, generator=generator) * 0.1,
            )
            for key, one in linear.items()
            if key.endswith(ends)
        }
        return LoraAdapter(name, Path(), pairs)

    adapters = [adapter("all", 5, ("_proj",)), adapter("some", 40, ("k_proj", "up_proj", "down_proj"))]
    runner.set_lora(LoraWeights(runner.model, adapters, runner.spec.dtype))


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3}])
@torch.inference_mode()
def test_rows_with_adapters_are_independent_too(sizes: dict[str, Any]) -> None:
    """Rows of the base are those of a batch without adapters, bitwise; and errors are those of PyTorch."""
    sizes = {**sizes, "num_key_value_heads": 1}
    model = make_model(**sizes)
    exact, runner = LlamaRunner(model), LlamaRunner(make_model(**sizes).to(BF16))
    for one in (exact, runner):
        adapt(one, torch.Generator().manual_seed(3))
    lengths, behind, adapters = [1 + row % 7 for row in range(40)], [False] * 40, [row * row % 3 for row in range(40)]
    adapters[5:20:3] = [2] * 5

    def decode(one: LlamaRunner, rows: list[int], chosen: list[int]) -> Tensor:
        cache, order = rows_of(one, lengths, behind), list(range(40))
        for row in set(order) - set(rows):
            at = order.index(row)
            cache.drop(at)
            order[at] = order[-1]
            order.pop()
        found = one.decode([100 + row for row in order], cache, None, [chosen[row] for row in order] if chosen else ())
        return found[[order.index(row) for row in rows]]

    every = list(range(40))
    together, base = decode(runner, every, adapters), decode(runner, every, [])
    for rows in ([0, 3, 6], [1, 2], [7], every[10:27]):
        assert torch.equal(decode(runner, rows, adapters), together[rows])
    of_base = [adapter == 0 for adapter in adapters]
    assert torch.equal(together[of_base], base[of_base]) and not torch.isclose(together, base).all(-1)[5]
    plain = LlamaRunner(runner.model)
    adapt(plain, torch.Generator().manual_seed(3))
    plain.native = exact.native = None
    rounded, want = (decode(one, every, adapters) for one in (plain, exact))
    assert (together - want).square().mean() < 1.1 * (rounded - want).square().mean()


@torch.inference_mode()
def test_layers_with_adapters_add_their_terms_before_activation_and_residual() -> None:
    runner = LlamaRunner(make_model(intermediate_size=128).to(BF16))
    adapt(runner, torch.Generator().manual_seed(3))
    layer, generator = runner.layers[0], torch.Generator().manual_seed(4)
    x = bf16(generator, 6, 64)
    step = runner.lora_step([0, 1, 2], [2, 3, 1])
    assert step is not None and layer.gated
    gate_up = layer.gate_up.tiles
    assert gate_up is not None and gate_up.part.rows == 256
    got, base = layer.feed_forward(x, step), layer.feed_forward(x)
    torch.testing.assert_close(got[:2], base[:2], rtol=2**-5, atol=2**-4)
    normed = layer.mlp_norm(x).double()
    for row, adapter in enumerate([0, 0, 1, 1, 1, 2]):
        merged = []
        for linear in (layer.gate_up, layer.down):
            assert linear.weight is not None and linear.lora is not None
            weight, at = linear.weight.double(), 0
            for pair, size in zip(linear.lora.parts[adapter], linear.lora.sizes, strict=True):
                if pair is not None:
                    weight[at : at + size] += pair[1].double() @ pair[0].double()
                at += size
            merged.append(weight)
        gate, up = (merged[0] @ normed[row]).chunk(2)
        want = x[row].double() + merged[1] @ (F.silu(gate) * up)
        torch.testing.assert_close(got[row].double(), want, rtol=0.04, atol=0.04)


@torch.inference_mode()
def test_without_tiles_decoding_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel asks for permission, which Linux may refuse."""
    model = make_model().to(BF16)
    tiled = LlamaRunner(model)
    monkeypatch.setattr(decoder, "has_tiles", lambda: False)
    monkeypatch.setattr(packed, "has_tiles", lambda: False)
    plain = LlamaRunner(model)
    assert plain.native is not None and plain.native.max_rows == 12
    assert all(linear.tiles is None for layer in plain.layers for linear in layer.projections)
    got, want = (decode_again(runner, rows_of(runner, [3, 50], [True, False]), 2) for runner in (tiled, plain))
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bfloat16 chat model with a CLIP tower whose sizes fill tiles."""
    root = tmp_path_factory.mktemp("tiles")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = make_clip_tower(root / "tower", **sizes)
    make_chat(root / "chat", tower, mm_hidden_size=64, mm_vision_select_layer=-2)
    return load_pretrained_model(root / "chat", device="cpu", dtype=BF16)


@torch.inference_mode()
def test_the_tower(chat: Any) -> None:
    """Features are those of the tower's own layers, up to rounding, for any number of images."""
    _, model, processor, _ = chat
    encoder = FeatureEncoder(model, processor, None, budget=0)
    assert encoder.tower is not None
    side = model.get_vision_tower().config.image_size
    images = [hash_image(torch.randn(3, side, side, generator=torch.Generator().manual_seed(at))) for at in range(3)]
    found = encoder.encode(images)
    for image in images:
        pixels: Any = image.content
        want = model.encode_images(pixels.to(BF16)[None])[0]
        torch.testing.assert_close(found[image.digest].float(), want.float(), atol=0.05, rtol=0.05)
        assert torch.equal(encoder.encode([image])[image.digest], found[image.digest])
        parts = encoder.encode_by_layer([image])
        for _ in model.get_vision_tower().layers:
            next(parts)
        with pytest.raises(StopIteration) as stop:
            next(parts)
        assert torch.equal(stop.value.value[image.digest], found[image.digest])


def test_the_tower_runs_its_own_layers_again_afterwards(chat: Any) -> None:
    runner = TowerRunner.build(chat[1])
    assert runner is not None
    with runner.active():
        assert runner.encoder.run is not None
    with pytest.raises(KeyError), runner.active():
        raise KeyError
    assert runner.encoder.run is None
    chat[1].get_vision_tower().vision_tower.vision_model.encoder.layers[0].norm_after = True
    assert TowerRunner.build(chat[1]) is None
