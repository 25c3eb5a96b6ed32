"""Device, dtype and attention decisions, with CUDA imitated."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from llava.errors import ConfigError
from llava.placement import offline, resolve_attention, resolve_device, resolve_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
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


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert not offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline()
