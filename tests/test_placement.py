"""Device, dtype and attention selection, with simulated CUDA."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava import placement
from llava.errors import ConfigError
from llava.placement import offline, resolve_attention, resolve_device, resolve_dtype, to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn" or None)


def test_without_a_gpu() -> None:
    assert resolve_device().type == "cpu"
    assert resolve_dtype(CPU, None, torch.float16) is torch.float32
    assert resolve_dtype(CPU, "bf16") is torch.bfloat16
    assert resolve_dtype(CPU, torch.float16) is torch.float16
    assert resolve_attention(CPU, torch.float32) == "sdpa"
    assert resolve_attention(CPU, torch.float32, "eager") == "eager"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "tpu9"])
def test_absent_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        resolve_device(name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        resolve_dtype(CPU, "int3")
    with pytest.raises(ConfigError, match="fast"):
        resolve_attention(CPU, torch.float32, "fast")
    with pytest.raises(ConfigError, match="flash_attention_2 needs .* cpu with float32"):
        resolve_attention(CPU, torch.float32, "flash_attention_2")


def test_with_a_gpu(ampere: None) -> None:
    assert resolve_device().type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="only 2 GPUs"):
        resolve_device("cuda:2")
    assert resolve_dtype(CUDA, None, torch.bfloat16) is torch.bfloat16
    assert resolve_dtype(CUDA) is torch.float16
    assert resolve_attention(CUDA, torch.float16) == "flash_attention_2"
    assert resolve_attention(CUDA, torch.float32) == "sdpa"
    assert resolve_attention(CUDA, torch.bfloat16, "flash_attention_2") == "flash_attention_2"


def test_to_device_pins_only_what_goes_from_the_cpu_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    tensor, pinned, there = torch.arange(6.0), torch.arange(6.0), torch.empty(6, device="meta")

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        source = "pinned" if self is pinned else str(self.device)
        calls.append(f"{source} to {device}, {non_blocking}")
        return there

    def pin(self: torch.Tensor) -> torch.Tensor:
        assert self is tensor
        return pinned

    assert to_device(tensor, CPU) is tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for source, device in ((tensor, CUDA), (tensor, torch.device("mps")), (there, CUDA)):
        assert to_device(source, device) is there
    assert calls == ["pinned to cuda, True", "cpu to mps, False", "meta to cuda, False"]


def test_bfloat16_is_a_matter_of_the_chosen_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the current device and of PyTorch's check, which is true for emulation."""
    cards = {0: (8, 0), 1: (7, 0), 2: (7, 5), 3: (9, 0)}  # A100, V100, T4, H100
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device.index or 0])
    found = {index: resolve_dtype(torch.device("cuda", index), "auto", torch.bfloat16) for index in cards}
    assert found == {0: torch.bfloat16, 1: torch.float16, 2: torch.float16, 3: torch.bfloat16}
    assert resolve_dtype(CUDA, None, torch.bfloat16) is torch.bfloat16
    assert resolve_dtype(torch.device("cuda:1"), "bfloat16") is torch.bfloat16  # as requested
    assert resolve_dtype(torch.device("mps"), None, torch.bfloat16) is torch.float16
    monkeypatch.setattr(torch.version, "hip", "6.2")  # AMD numbers its architectures in its own way
    assert resolve_dtype(torch.device("cuda:1"), None, torch.bfloat16) is torch.bfloat16


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert not offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline()


# --- several GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("20GiB", {0: 20 * 2**30, 1: 20 * 2**30}),
        ("0=10GiB,1=1.5GB", {0: 10 * 2**30, 1: 1_500_000_000}),
        ("1 = 512 mib", {1: 512 * 2**20}),
        ("1000", {0: 1000, 1: 1000}),
    ],
)
def test_memory_in_words(text: str, sizes: dict[int, int]) -> None:
    assert placement.parse_memory(text, [0, 1]) == sizes


@pytest.mark.parametrize("text", ["", "lots", "20GiB,10GiB", "0=", "a=1GiB", "1TiB", "-1GiB"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a size such as 20GiB"):
        placement.parse_memory(text, [0])


def test_budgets_of_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000 * (index + 1), 4000))
    assert placement.gpu_budgets() == {torch.device("cuda:0"): 850, torch.device("cuda:1"): 1700}
    assert placement.gpu_budgets(1) == {torch.device("cuda:0"): 850}
    assert placement.gpu_budgets(max_memory="1=5KB") == {torch.device("cuda:1"): 5000}
    with pytest.raises(ConfigError, match=r"--num-gpus must be between 1 and the number of visible GPUs \(2\), got 3"):
        placement.gpu_budgets(3)
    with pytest.raises(ConfigError, match="names GPU 2"):
        placement.gpu_budgets(max_memory="2=1GiB")


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    room=st.lists(st.integers(1, 120), min_size=1, max_size=5),
)
def test_spread_keeps_order_and_budgets(sizes: list[int], room: list[int]) -> None:
    parts = [((f"layer{i}",) if i else ("",), size) for i, size in enumerate(sizes)]
    budgets = {torch.device("meta", i): size for i, size in enumerate(room)}
    try:
        found = placement.balanced_device_map(parts, budgets)
    except ConfigError:
        # refused only where filling device after device does not work either
        at = used = 0
        for size in sizes:
            while at < len(room) and used + size > room[at]:
                at, used = at + 1, 0
            used += size
        assert at == len(room)
        return
    order = [found.of(names[0]).index for names, _ in parts]
    assert order == sorted(order)
    for device, limit in budgets.items():
        assert sum(size for names, size in parts if found.of(names[0]) == device) <= limit


def test_spread_uses_few_devices_evenly() -> None:
    budgets = {torch.device("meta", i): 100 for i in range(4)}
    parts = [(("",), 20), *(((f"l{i}",), 10) for i in range(10))]
    order = [placement.balanced_device_map(parts, budgets).of(names[0]).index for names, _ in parts]
    assert order == [0] * 5 + [1] * 6
    assert not placement.balanced_device_map(parts[:5], budgets).is_split


@pytest.mark.parametrize(("device", "given", "found"), [(CPU, None, "128"), (CPU, "7", "7"), (CUDA, None, None)])
def test_onednn_keeps_few_primitives(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, given: str | None, found: str | None
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    placement.limit_onednn_cache(device)
    assert os.environ.get(name) == found
