"""Device, dtype and attention kernel of a model, and its placement on several GPUs."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
MEMORY_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FREE_FOR_WEIGHTS = 0.85  # of a GPU's free memory; the rest is for the KV cache, activations and images
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """The device `name`; `None` or "auto" is CUDA, else MPS, else the CPU. Raises `ConfigError` if it is not there."""
    text = str(name or "auto")
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {text!r}; use cuda, cuda:N, mps or cpu.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Device {text!r} is not available: no CUDA GPU is visible; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"Device {text!r} is not available: only {torch.cuda.device_count()} GPUs are visible.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("Device 'mps' is not available: no Apple GPU was found; use --device cpu.")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as "float16" or "bf16"."""
    if name not in DTYPES:
        raise ConfigError(f"Unknown dtype {name!r}; use float32, float16 or bfloat16.")
    return DTYPES[name]


def resolve_dtype(
    device: torch.device, requested: str | torch.dtype | None = None, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of weights: as requested, else float32 on the CPU and 16 bit on a GPU.

    On CUDA, that is bfloat16 if `stored`, the dtype of the checkpoint, is bfloat16 and the GPU supports it.
    """
    if isinstance(requested, torch.dtype):
        return requested
    if requested not in (None, "auto"):
        return parse_dtype(requested)
    if device.type == "cpu":
        return torch.float32
    if stored is torch.bfloat16 and device.type == "cuda" and supports_bfloat16(device):
        return torch.bfloat16
    return torch.float16


def supports_bfloat16(device: torch.device) -> bool:
    """Whether the GPU `device` computes in bfloat16 natively (NVIDIA since Ampere, all of ROCm).

    `torch.cuda.is_bf16_supported` is also true for the slow emulation on V100 and T4, and tests the current device.
    """
    if torch.version.hip:
        return bool(torch.cuda.is_bf16_supported())
    return is_ampere(device)


@functools.cache
def is_ampere(device: torch.device) -> bool:
    """Whether the CUDA GPU `device` is of compute capability 8.0 (Ampere) or newer."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without a copy if it is there already.

    The copy to CUDA is asynchronous, from a pinned buffer. A tensor that is already pinned is read directly: do not
    overwrite it before the copy is complete.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def flash_attention_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention-2 can run: the package is installed, the GPU is Ampere or newer, the dtype 16 bit."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return importlib.util.find_spec("flash_attn") is not None and is_ampere(device)


def resolve_attention(
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = "auto",
    supported: Sequence[str] = ("sdpa", "eager", "flash_attention_2"),
) -> str:
    """The attention implementation of a language model.

    "auto" is flash_attention_2 where it can run, else sdpa; or the first of `supported` if that is not among them.
    """
    requested = requested or "auto"
    if requested not in ATTENTION:
        raise ConfigError(f"Unknown attention {requested!r}; use one of {', '.join(ATTENTION)}.")
    if requested == "auto":
        best = "flash_attention_2" if flash_attention_available(device, dtype) else "sdpa"
        return best if best in supported else supported[0]
    if requested not in supported:
        raise ConfigError(
            f"This language model supports {' and '.join(supported)} attention only, not {requested}; use "
            "--attn_implementation auto."
        )
    if requested == "flash_attention_2" and not flash_attention_available(device, dtype):
        raise ConfigError(
            f"flash_attention_2 needs the flash-attn package, an Ampere or newer GPU and 16-bit weights, but this "
            f"run uses {device.type} with {str(dtype).removeprefix('torch.')}; use --attn_implementation auto."
        )
    return requested


def runs_fused_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `torch.nn.functional.rms_norm` is a single kernel for these tensors: on CUDA since torch 2.9.

    Older releases run several; torch 2.4 squares in 16 bit, where float16 overflows at 256.
    """
    return x.is_cuda and x.dtype == weight.dtype and hasattr(torch.ops.aten, "_fused_rms_norm")


def avoid_cudnn_attention(device: torch.device) -> None:
    """Disable the cuDNN backend of `scaled_dot_product_attention` on CUDA, for the whole process.

    It is the default on Hopper, and builds an execution plan for every new shape: longer than a step on text, whose
    batches nearly always have a new shape.
    """
    if device.type == "cuda" and hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def limit_onednn_cache(device: torch.device) -> None:
    """Let oneDNN keep 128 compiled primitives instead of 1,024, unless the environment says otherwise.

    A primitive in bfloat16 takes about a megabyte, and packed batches nearly always have new shapes. Call it before the
    first product.
    """
    if device.type == "cpu":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def prefers_matrix_vector(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a single token should use matrix-vector products: in 16 bit on the CPU, where they reach the memory
    bandwidth and matrix products a third of it."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def native_decode_rows(dtype: torch.dtype, *, tiles: bool = False) -> int:
    """The largest batch that the C++ kernel decodes faster than PyTorch (measured on two cores with AVX-512): in 16 bit
    a small one, unless the kernel uses the matrix units of the processor, `tiles`."""
    return 64 if tiles else 32 if dtype == torch.float32 else 12


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` disables network access."""
    flags = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(flag.strip().lower() in {"1", "true", "yes", "on"} for flag in flags)


@dataclass(frozen=True)
class Placement:
    """The device of each weight of a model, by module name; the longest matching prefix applies, "" matches all."""

    devices: Mapping[str, torch.device]

    def of(self, name: str) -> torch.device:
        """The device of the weight or module `name`."""
        while name not in self.devices:
            if not name:
                raise ConfigError('This device map leaves out some modules; add an entry "" for the rest.')
            name = name.rpartition(".")[0]
        return self.devices[name]

    @property
    def is_split(self) -> bool:
        return len(set(self.devices.values())) > 1


def gpu_budgets(num_gpus: int | None = None, max_memory: str | None = None) -> dict[torch.device, int]:
    """Bytes of weights for each visible GPU: `max_memory`, else a fraction of its free memory.

    `num_gpus` limits the GPUs to the first ones (`CUDA_VISIBLE_DEVICES` selects and orders them). `max_memory` is one
    size for all ("20GiB"), or sizes by index ("0=10GiB,1=20GiB"; other GPUs are not used).
    """
    visible = torch.cuda.device_count()
    if num_gpus is not None and not 1 <= num_gpus <= visible:
        raise ConfigError(f"--num-gpus must be between 1 and the number of visible GPUs ({visible}), got {num_gpus}.")
    chosen = list(range(visible if num_gpus is None else num_gpus))
    limits = parse_memory(max_memory, chosen) if max_memory else None
    budgets = {}
    for index in chosen if limits is None else limits:
        if index not in chosen:
            raise ConfigError(f"--max-memory names GPU {index}, but only GPUs 0 to {len(chosen) - 1} are used.")
        free = int(torch.cuda.mem_get_info(index)[0] * FREE_FOR_WEIGHTS) if limits is None else limits[index]
        budgets[torch.device("cuda", index)] = free
    return budgets


def parse_memory(text: str, gpus: Sequence[int]) -> dict[int, int]:
    """Parse `--max-memory` to bytes by GPU index."""
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    sizes = {}
    for number, mark, size in parts:
        found = parse_size(size)
        plain = mark and number.strip().isdigit()
        if found is None or not (plain or (not mark and len(parts) == 1)):
            raise ConfigError(
                f"--max-memory must be a size such as 20GiB, or sizes such as 0=10GiB,1=20GiB, got {text!r}."
            )
        for index in [int(number)] if plain else gpus:
            sizes[index] = found
    return sizes


def parse_size(text: str) -> int | None:
    """Bytes of a size such as "20GiB", "512 MB" or "1000"; None if `text` is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    return int(float(match[1]) * MEMORY_UNITS[match[2]]) if match is not None and match[2] in MEMORY_UNITS else None


Parts = Sequence[tuple[tuple[str, ...], int]]


def balanced_device_map(parts: Parts, budgets: Mapping[torch.device, int]) -> Placement:
    """Place `parts` (module names and bytes, in order of computation) on as few devices as hold them, in order.

    A device too small for the next part is skipped. The load is balanced over the devices in use.
    """
    total = sum(size for _, size in parts)
    devices = list(budgets)
    for count in range(1, len(devices) + 1):
        for even in (total / count, float("inf")):
            found = _fill_in_order(parts, {device: min(budgets[device], even) for device in devices[:count]}, budgets)
            if found is not None:
                return Placement(found)
    room = ", ".join(f"{device} {size / 2**30:.1f}" for device, size in budgets.items())
    raise ConfigError(
        f"The model's {total / 2**30:.1f} GiB of weights do not fit (GiB for weights: {room or 'no GPU'}); use more "
        "GPUs, --load-8bit or --load-4bit, or --device cpu."
    )


def _fill_in_order(
    parts: Parts, targets: Mapping[torch.device, float], budgets: Mapping[torch.device, int]
) -> dict[str, torch.device] | None:
    """Assign parts to each device until most of the next one would exceed its target; None if they do not fit."""
    placed: dict[str, torch.device] = {}
    devices = list(targets)
    at, used = 0, 0
    for names, size in parts:
        while used + size > budgets[devices[at]] or (used and used + size / 2 > targets[devices[at]]):
            at, used = at + 1, 0
            if at == len(devices):
                return None
        placed.update(dict.fromkeys(names, devices[at]))
        used += size
    return placed
