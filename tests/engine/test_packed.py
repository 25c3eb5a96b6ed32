"""The C++ kernel computes what the dequantized weights of bitsandbytes compute, without a copy of them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.engine.llama import LlamaRunner
from llava.engine.native import build, packed
from llava.engine.native.packed import PackedLinear
from llava.model.quantization import Quantizer
from tests.engine.test_llama import VARIANTS, make_model
from tests.engine.test_native import check_rows_are_independent, rows_of

bnb = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
CLOSE: dict[torch.dtype, Any] = {
    torch.float32: {"atol": 2e-4, "rtol": 1e-4},
    torch.bfloat16: {"atol": 0.15, "rtol": 0.05},
}
LENGTHS, BEHIND = [1, 5, 2, 7, 3, 4, 6], [True, False, True, True, False, True, False]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Build the library anew, and again after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def quantize(model: Any, bits: int, **scheme: Any) -> Any:
    """Quantize the layers of a model in place."""
    quantizer = Quantizer(bits, model.dtype, CPU, **scheme)
    for name, parameter in list(model.named_parameters()):
        quantizer.quantize_on_load(model, name, parameter.data, CPU)
    return model.eval()


def dequantize(layer: Any) -> Any:
    """The float32 weight (out, in) that bitsandbytes means."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * scales[:, None] / 127
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([layer.weight.data >> 4, layer.weight.data & 15], -1).flatten().int()
    return (state.code[codes].view(-1, state.blocksize) * scales.view(-1, 1)).view(state.shape)


def dequantized(like: Any, model: Any) -> Any:
    """`like`, in float32, with the dequantized weights of `model`."""
    like = like.float().eval()
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            like.get_submodule(name).weight.data = dequantize(module)
    return like


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("variant", ["grouped", "one key head", "biased", "tied"])
@torch.inference_mode()
def test_logits_and_caches_equal_those_of_the_dequantized_weights(variant: str, bits: int, dtype: torch.dtype) -> None:
    """With one key head, 4 bit leaves the key, value and down projections as they are."""
    model = quantize(make_model(**VARIANTS[variant]).to(dtype), bits)
    kernel, plain = LlamaRunner(model), LlamaRunner(dequantized(make_model(**VARIANTS[variant]).to(dtype), model))
    assert kernel.native is not None
    plain.native = None
    caches = [rows_of(runner, LENGTHS, BEHIND) for runner in (kernel, plain)]
    for step in range(4):
        ids = [100 + step + 5 * row for row in range(7)]
        got, want = (runner.decode(ids, cache) for runner, cache in zip((kernel, plain), caches, strict=True))
        torch.testing.assert_close(got, want, **CLOSE[dtype])
    for row in range(7):
        torch.testing.assert_close(caches[0].row(row).float(), caches[1].row(row), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(bits: int, dtype: torch.dtype) -> None:
    """Logits are bitwise equal for every batch size."""
    check_rows_are_independent(LlamaRunner(quantize(make_model().to(dtype), bits)))


@pytest.mark.parametrize(
    ("bits", "scheme"),
    [(8, {}), (4, {}), (4, {"double_quant": False}), (4, {"quant_type": "fp4"})],
    ids=["int8", "nf4", "nf4 with float32 scales", "fp4"],
)
@torch.inference_mode()
def test_unpacked_weights_are_those_of_the_library(
    monkeypatch: pytest.MonkeyPatch, bits: int, scheme: dict[str, Any]
) -> None:
    monkeypatch.setattr(packed, "SLICE", 128 * 50)
    weight = torch.randn(288, 128, generator=torch.Generator().manual_seed(1))
    bias = nn.Parameter(torch.linspace(-1, 1, 288))
    layer = Quantizer(bits, torch.float32, CPU, **scheme).layer(weight, bias, CPU)
    linear = packed.pack_linear(layer)
    assert isinstance(linear, PackedLinear)
    whole = dequantize(layer)
    found = linear.unpack(0, 288, torch.empty(288, 128))
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    part = linear.unpack(7, 20, torch.empty(13, 128, dtype=torch.bfloat16))
    assert torch.equal(part, found[7:20].bfloat16())
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    for count in (1, 5, packed.FEW_ROWS, 40):
        some = x[:count]
        torch.testing.assert_close(linear(some), some @ whole.T + bias)
        torch.testing.assert_close(linear(some.bfloat16()).float(), some @ whole.T + bias, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_the_packed_weights_are_in_memory_once(bits: int) -> None:
    """The kernel reads the parameters of the layers, which their own forward leaves in place."""
    model = quantize(make_model(intermediate_size=128).bfloat16(), bits)
    before = [parameter.data_ptr() for parameter in model.parameters() if not parameter.is_floating_point()]
    runner = LlamaRunner(model)
    model(torch.tensor([[1, 5, 9]]))
    after = [parameter.data_ptr() for parameter in model.parameters() if not parameter.is_floating_point()]
    modules: list[Any] = [one for layer in runner.layers for linear in layer.projections for one in linear.modules]
    parts: list[packed.Part] = [module.part for module in modules]
    assert len(parts) == 2 * 7 and sorted(part.record.data for part in parts) == sorted(before) == sorted(after)
    scales = [part.tensors["scale_codes" if bits == 4 else "scales"] for part in parts]
    whole = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_floating_point())
    assert sum(tensor.nbytes for tensor in scales if tensor is not None) < 0.1 * whole


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512"])
@torch.inference_mode()
def test_older_processors(target: str, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Without vectors, with AVX2, and with AVX-512 but no bfloat16 product."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if {"haswell": "avx2", "skylake-avx512": "avx512bw"}.get(target, "fpu") not in flags:
        pytest.skip("this processor cannot run it")
    monkeypatch.setattr(build, "FLAGS", [f"-march={target}" if "march" in flag else flag for flag in build.FLAGS])
    for bits in (8, 4):
        model = quantize(make_model(intermediate_size=128).bfloat16(), bits)
        kernel, plain = (
            LlamaRunner(model),
            LlamaRunner(dequantized(make_model(intermediate_size=128).bfloat16(), model)),
        )
        assert kernel.native is not None
        plain.native = None
        got, want = (
            runner.decode([100, 105, 110], rows_of(runner, [2, 3, 1], [True, False, True]))
            for runner in (kernel, plain)
        )
        torch.testing.assert_close(got, want, **CLOSE[torch.bfloat16])


def test_without_the_kernel_the_library_computes(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setenv("LLAVA_NATIVE", "0")
    runner = LlamaRunner(quantize(make_model(), 8))
    assert runner.native is None
    assert all(isinstance(module, bnb.nn.Linear8bitLt) for module in runner.layers[0].qkv.modules)


@torch.inference_mode()
def test_layers_the_kernel_does_not_read() -> None:
    """Inputs in 16 bit, blocks of another size, a layout of the library's own, and layers of other libraries."""
    layer: Any = Quantizer(8, torch.float16, CPU).layer(torch.randn(32, 64), None, CPU)
    linear: Any = packed.pack_linear(layer)
    x = torch.randn(3, 64).half()
    assert isinstance(linear, PackedLinear) and torch.equal(linear(x), layer(x))
    four: Any = Quantizer(4, torch.bfloat16, CPU).layer(torch.randn(32, 64), None, CPU)
    four.quant_state.blocksize = 128
    assert packed.pack_linear(four) is four
    four.quant_state.blocksize, four.quant_state.packing_format_for_cpu = 64, True
    assert packed.pack_linear(four) is four

    class Other(nn.Linear):
        """Stands for a layer with an adapter."""

    other = Other(64, 32)
    assert packed.pack_linear(other) is other and packed.part_of(other, torch.float32) is None
