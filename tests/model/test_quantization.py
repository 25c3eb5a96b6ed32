"""8- and 4-bit loading on the CPU, with the real library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.errors import ConfigError
from llava.model.builder import load_pretrained_model
from llava.model.quantization import Quantizer
from tests.tiny import make_chat

PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
IDS = torch.tensor([[1, 5, -200, 9, 11]])


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.2)])
def test_only_the_decoder_is_quantised_and_the_function_stays(
    tiny_dirs: dict[str, Path], tmp_path: Path, bits: int, tolerance: float
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


def test_four_bits_on_a_cpu_need_whole_blocks(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A down projection from 96 is not made of blocks of 64: it stays as it is, the others are packed."""
    chat = make_chat(tmp_path, tiny_dirs["tower"], hidden_size=64, intermediate_size=96)
    model = load_pretrained_model(chat, device="cpu", load_4bit=True)[1]
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.uint8}
    assert not any("down_proj" in name for name in packed)
    assert len(packed) == 2 * 6
    with torch.no_grad():
        assert model(IDS, images=PIXELS).logits.isfinite().all()


def test_faults() -> None:
    with pytest.raises(ConfigError, match="4 or 8"):
        Quantizer(3, torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match="not on mps"):
        Quantizer(4, torch.float32, torch.device("mps"))
