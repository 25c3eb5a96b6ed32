"""8-bit and 4-bit loading on the CPU with bitsandbytes."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.errors import ConfigError, DependencyError
from llava.model import builder, quantization
from llava.model.builder import load_pretrained_model
from llava.model.quantization import Quantizer
from tests.tiny import make_base, make_chat, make_lora

PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
IDS = torch.tensor([[1, 5, -200, 9, 11]])


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.2)])
def test_only_the_decoder_is_quantized(
    tiny_dirs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int, tolerance: float
) -> None:
    chat = make_chat(tmp_path, tiny_dirs["tower"], hidden_size=64, intermediate_size=128)
    full = load_pretrained_model(chat, device="cpu")[1]
    small = load_pretrained_model(chat, device="cpu", load_8bit=bits == 8, load_4bit=bits == 4)[1]
    dtypes = {name: parameter.dtype for name, parameter in small.named_parameters()}
    packed = {name for name, dtype in dtypes.items() if dtype in (torch.int8, torch.uint8)}
    assert packed == {name for name in dtypes if ".layers." in name and "_proj" in name and "tower" not in name}
    assert len(packed) == 2 * 7
    with torch.no_grad():
        want, got = (model(IDS, images=PIXELS).logits for model in (full, small))
    assert (got - want).norm() / want.norm() < tolerance
    assert not torch.equal(got, want)
    assert "inputs will be cast" not in caplog.text  # a line for every product of every token


def test_four_bits_on_a_cpu_need_whole_blocks(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A down projection of input width 96, not a multiple of 64, stays unquantized; the others are quantized."""
    chat = make_chat(tmp_path, tiny_dirs["tower"], hidden_size=64, intermediate_size=96)
    model = load_pretrained_model(chat, device="cpu", load_4bit=True)[1]
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.uint8}
    assert not any("down_proj" in name for name in packed)
    assert len(packed) == 2 * 6
    with torch.no_grad():
        assert model(IDS, images=PIXELS).logits.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_is_merged_layer_by_layer_before_it_is_packed(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """The weights equal those merged in full precision and then quantized, with one unquantized matrix at a time."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base = make_base(tmp_path / "base", **sizes)
    halves = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_lora(tmp_path / "run", make_chat(tmp_path / "chat", tiny_dirs["tower"], **sizes), base)
    full = load_pretrained_model(adapter, device="cpu")[1]
    load, most, seen = Quantizer.quantize_on_load, [], []

    def watch(self: Quantizer, model: nn.Module, name: str, *rest: Any) -> bool:
        names = (name for name, _ in model.named_parameters() if name.startswith("model.layers."))
        matrices = (model.get_parameter(name) for name in names if ".lora_" not in name)
        assert [ref().shape for ref in seen if ref() is not None] == []  # those quantized before are freed
        seen.append(weakref.ref(model.get_parameter(name)))
        most.append(sum(weight.ndim == 2 and weight.dtype is torch.float32 for weight in matrices))
        return load(self, model, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Quantizer, "quantize_on_load", watch)
        small = load_pretrained_model(adapter, device="cpu", load_8bit=bits == 8, load_4bit=bits == 4)[1]
    assert most == [1] * 14
    quantizer = Quantizer(bits, torch.float32, torch.device("cpu"))
    for name, parameter in list(full.named_parameters()):
        quantizer.quantize_on_load(full, name, parameter.data, parameter.device)
    assert small.model.layers[0].self_attn.q_proj.weight.dtype is (torch.int8 if bits == 8 else torch.uint8)
    assert small.model.mm_projector[0].weight.dtype is torch.float32
    with torch.no_grad():
        want, got = (model.eval()(IDS, images=PIXELS).logits for model in (full, small))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("shape", [(96, 64), (288, 64), (5, 13)])
def test_slices_are_packed_as_the_library_packs_the_whole(
    monkeypatch: pytest.MonkeyPatch, quant_type: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    import bitsandbytes as bnb

    monkeypatch.setattr(quantization, "SLICE", 40 * quantization.BLOCK)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scheme = {"quant_type": quant_type, "compress_statistics": double_quant}
    whole = bnb.nn.Params4bit(weight, requires_grad=False, **scheme).to("cpu")
    cpu = torch.device("cpu")
    ours = Quantizer(4, torch.bfloat16, cpu, quant_type, double_quant).layer(weight, None, cpu)
    assert torch.equal(ours.weight.data, whole.data)
    theirs, found = (state.as_dict(packed=True) for state in (whole.quant_state, ours.weight.quant_state))
    assert theirs.keys() == found.keys()
    for name, value in theirs.items():
        assert torch.equal(found[name], value), name
    assert ours.quant_state is ours.weight.quant_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_packed_as_the_library_packs_the_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    monkeypatch.setattr(quantization, "SLICE", 100)
    weight = torch.randn((37, 24), generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    cpu = torch.device("cpu")
    ours = Quantizer(8, dtype, cpu).layer(weight, None, cpu).weight
    assert torch.equal(ours.data, whole.data) and torch.equal(ours.CB, whole.CB) and torch.equal(ours.SCB, whole.SCB)


def test_eight_bits_do_not_wait_for_the_first_forward_pass() -> None:
    """bitsandbytes quantizes only CPU weights in `.to`; weights on the device must be quantized too."""
    import bitsandbytes as bnb

    there = torch.device("meta")  # like a GPU, it is not the CPU
    weight = torch.empty((6, 64), dtype=torch.bfloat16, device=there)
    left = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to(there)
    assert left.dtype is torch.float16  # why the layer does not rely on it
    found = Quantizer(8, torch.bfloat16, torch.device("cuda")).layer(weight, None, there).weight
    assert found.dtype is found.CB.dtype is torch.int8 and found.SCB.dtype is torch.float32
    assert (found.shape, found.SCB.shape) == ((6, 64), (6,))
    assert {found.device, found.CB.device, found.SCB.device} == {there}


@pytest.mark.parametrize("contiguous", [True, False])
def test_eight_bits_match_quantization_at_first_use(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    import bitsandbytes as bnb

    kernel, dense = bnb.functional.int8_vectorwise_quant, []

    def quantize(matrix: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        dense.append(matrix.is_contiguous())  # the CUDA kernel reads rows without looking at strides
        return kernel(matrix, *rest, **kwargs)

    draw = torch.Generator().manual_seed(1)
    weight = torch.randn((64, 32), generator=draw).to(torch.bfloat16)
    weight = weight if contiguous else weight.t().contiguous().t()
    inputs = torch.randn((2, 5, 32), generator=draw)
    inputs[0, :, 3] = 20.0  # a column of outliers
    late = bnb.nn.Linear8bitLt(32, 64, bias=False, has_fp16_weights=False, threshold=6.0, device="meta").eval()
    late.weight = bnb.nn.Int8Params(
        weight.half(), requires_grad=False, has_fp16_weights=False
    )  # as on a GPU, not moved
    with monkeypatch.context() as patch:
        patch.setattr(bnb.functional, "int8_vectorwise_quant", quantize)
        early = Quantizer(8, torch.bfloat16, torch.device("cpu")).layer(weight, None, torch.device("cpu")).eval()
    assert dense == [True]
    assert late.weight.dtype is torch.float16 and early.weight.dtype is torch.int8
    for _ in range(2):
        assert torch.equal(early(inputs), late(inputs))
    assert torch.equal(early.weight, late.weight)
    assert torch.equal(early.state.SCB, late.state.SCB)


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_are_packed_wherever_the_weight_is(double_quant: bool) -> None:
    import bitsandbytes as bnb

    there, dtype = torch.device("meta"), torch.bfloat16
    quantizer = Quantizer(4, dtype, torch.device("cuda"), double_quant=double_quant)
    found = quantizer.layer(torch.empty((64, 64), dtype=torch.float16, device=there), None, there).weight
    assert (found.dtype, found.shape, found.device) == (torch.uint8, (2048, 1), there)
    weight = torch.randn((64, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double_quant).to("cpu")
    packed, state = quantizer._quantize_4bit(weight, torch.device("cpu"))
    assert torch.equal(packed, whole.data)
    theirs, ours = (one.as_dict(packed=True) for one in (whole.quant_state, state))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_the_library_it_is_one_sentence(tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(builder, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(DependencyError, match=r"bitsandbytes.*llava\[quant\]"):
        load_pretrained_model(tiny_dirs["chat"], device="cpu", load_4bit=True)


def test_faults() -> None:
    with pytest.raises(ConfigError, match="4 or 8"):
        Quantizer(3, torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match="not on mps"):
        Quantizer(4, torch.float32, torch.device("mps"))
