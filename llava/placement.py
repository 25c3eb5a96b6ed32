"""Where and in what precision a model runs: the one place that decides device, dtype and attention kernel."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from llava.errors import ConfigError

logger = logging.getLogger(__name__)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """The device to use; `None` or "auto" takes CUDA, else Apple's MPS, else the CPU. An absent device is an error."""
    text = str(name or "auto")
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {text!r}; use cuda, cuda:N, mps or cpu.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Device {text!r} was asked for, but no CUDA GPU is visible; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"Device {text!r} was asked for, but only {torch.cuda.device_count()} GPUs are visible.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("Device 'mps' was asked for, but this is not an Apple GPU machine; use --device cpu.")
    return device


def resolve_dtype(
    device: torch.device, requested: str | torch.dtype | None = None, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of weights: as requested; else float32 on CPU, and 16 bit on a GPU.

    On CUDA the checkpoint's own 16-bit type is kept when the card has it, otherwise float16 is used.
    """
    if isinstance(requested, torch.dtype):
        return requested
    if requested not in (None, "auto"):
        if requested not in DTYPES:
            raise ConfigError(f"Unknown dtype {requested!r}; use auto, float32, float16 or bfloat16.")
        return DTYPES[requested]
    if device.type == "cpu":
        return torch.float32
    if stored is torch.bfloat16 and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float16


def flash_attention_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention-2 can run: importable, Ampere or newer, 16 bit. A broken install raises its own error."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return importlib.util.find_spec("flash_attn") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_attention(device: torch.device, dtype: torch.dtype, requested: str | None = "auto") -> str:
    """The language model's attention kernel; "auto" takes flash_attention_2 where it can run, else sdpa."""
    requested = requested or "auto"
    if requested not in ATTENTION:
        raise ConfigError(f"Unknown attention {requested!r}; use one of {', '.join(ATTENTION)}.")
    if requested == "auto":
        return "flash_attention_2" if flash_attention_available(device, dtype) else "sdpa"
    if requested == "flash_attention_2" and not flash_attention_available(device, dtype):
        raise ConfigError(
            f"flash_attention_2 needs the flash-attn package, an Ampere or newer GPU and 16-bit weights, but this run "
            f"uses {device.type} with {str(dtype).removeprefix('torch.')}; use --attn_implementation auto."
        )
    return requested


def offline() -> bool:
    """Whether the user forbade network access with `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`."""
    flags = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(flag.strip().lower() in {"1", "true", "yes", "on"} for flag in flags)
