"""Where and in what precision a model runs: the one place that decides device, dtype and attention kernel."""

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
FREE_FOR_WEIGHTS = 0.85  # of a GPU's free memory; the rest is for caches, activations and pictures
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


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as "float16" or "bf16"."""
    if name not in DTYPES:
        raise ConfigError(f"Unknown dtype {name!r}; use float32, float16 or bfloat16.")
    return DTYPES[name]


def resolve_dtype(
    device: torch.device, requested: str | torch.dtype | None = None, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of weights: as requested; else float32 on CPU, and 16 bit on a GPU.

    On CUDA the checkpoint's own 16-bit type is kept when the GPU supports it, otherwise float16 is used.
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
    """Whether the GPU `device` computes in bfloat16 natively: NVIDIA since Ampere, all of ROCm.

    PyTorch's own check also counts the slow emulation on older GPUs (V100, T4), and looks at the current device.
    """
    if torch.version.hip:
        return bool(torch.cuda.is_bf16_supported())
    return is_ampere(device)


@functools.cache
def is_ampere(device: torch.device) -> bool:
    """Whether the CUDA GPU `device` is of compute capability 8.0 (Ampere) or newer."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`, or the tensor itself if it is already there.

    On CUDA, one asynchronous copy from a pinned buffer: later work on the current stream sees the complete copy. A
    tensor that is already pinned is read directly, so do not overwrite it before that work has run.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def flash_attention_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention-2 can run: importable, Ampere or newer, 16 bit. A broken install raises its own error."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return importlib.util.find_spec("flash_attn") is not None and is_ampere(device)


def resolve_attention(
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = "auto",
    supported: Sequence[str] = ("sdpa", "eager", "flash_attention_2"),
) -> str:
    """The language model's attention kernel; "auto" takes flash_attention_2 where it can run, else sdpa.

    Of a model that has few, "auto" takes the first of `supported` when it lacks that one.
    """
    requested = requested or "auto"
    if requested not in ATTENTION:
        raise ConfigError(f"Unknown attention {requested!r}; use one of {', '.join(ATTENTION)}.")
    if requested == "auto":
        best = "flash_attention_2" if flash_attention_available(device, dtype) else "sdpa"
        return best if best in supported else supported[0]
    if requested not in supported:
        raise ConfigError(
            f"This language model has {' and '.join(supported)} attention only, not {requested}; use "
            "--attn_implementation auto."
        )
    if requested == "flash_attention_2" and not flash_attention_available(device, dtype):
        raise ConfigError(
            f"flash_attention_2 needs the flash-attn package, an Ampere or newer GPU and 16-bit weights, but this run "
            f"uses {device.type} with {str(dtype).removeprefix('torch.')}; use --attn_implementation auto."
        )
    return requested


def runs_fused_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `torch.nn.functional.rms_norm` is one kernel for these tensors: on CUDA since torch 2.9.

    In older releases it is several, and in 2.4 it squares in 16 bits, where float16 overflows at 256.
    """
    return x.is_cuda and x.dtype == weight.dtype and hasattr(torch.ops.aten, "_fused_rms_norm")


def avoid_cudnn_attention(device: torch.device) -> None:
    """Keep `scaled_dot_product_attention` from choosing cuDNN on CUDA, for the whole process.

    Recent releases prefer it on Hopper, and it builds an execution plan for every new shape, which takes longer than
    the step: batches of text have a new shape nearly every time.
    """
    if device.type == "cuda" and hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def prefers_matrix_vector(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one token alone is multiplied faster as a vector: in 16 bit on a CPU, whose matrix product reads the
    weights at a third of the memory's speed, and the vector product at all of it."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def native_decode_rows(dtype: torch.dtype) -> int:
    """Up to how many rows the C++ kernel decodes faster than PyTorch's products, where it can run at all (measured on
    two cores with AVX-512; with more rows the processor's matrix units win, in 16 bit sooner)."""
    return 32 if dtype == torch.float32 else 12


def offline() -> bool:
    """Whether the user forbade network access with `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`."""
    flags = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(flag.strip().lower() in {"1", "true", "yes", "on"} for flag in flags)


@dataclass(frozen=True)
class Placement:
    """Where the weights of one model lie: devices by module name; the longest name that leads to a weight decides.

    The name "" stands for all that no other name leads to.
    """

    devices: Mapping[str, torch.device]

    def of(self, name: str) -> torch.device:
        """The device of the weight or module called `name`."""
        while name not in self.devices:
            if not name:
                raise ConfigError('This device map leaves out some modules; add an entry "" for the rest.')
            name = name.rpartition(".")[0]
        return self.devices[name]

    @property
    def is_split(self) -> bool:
        return len(set(self.devices.values())) > 1


def gpu_budgets(num_gpus: int | None = None, max_memory: str | None = None) -> dict[torch.device, int]:
    """Bytes of weights each visible GPU may hold: what is free but for a reserve, or what `max_memory` says.

    `num_gpus` takes the first so many (`CUDA_VISIBLE_DEVICES` chooses and orders them). `max_memory` is one size for
    each ("20GiB"), or sizes by number ("0=10GiB,1=20GiB"; GPUs left out are not used).
    """
    visible = torch.cuda.device_count()
    if num_gpus is not None and not 1 <= num_gpus <= visible:
        raise ConfigError(f"--num-gpus {num_gpus} was asked for, but {visible} GPUs are visible.")
    chosen = list(range(visible if num_gpus is None else num_gpus))
    limits = parse_memory(max_memory, chosen) if max_memory else None
    budgets = {}
    for index in chosen if limits is None else limits:
        if index not in chosen:
            raise ConfigError(f"--max-memory names GPU {index}, but the GPUs to use are 0 to {len(chosen) - 1}.")
        free = int(torch.cuda.mem_get_info(index)[0] * FREE_FOR_WEIGHTS) if limits is None else limits[index]
        budgets[torch.device("cuda", index)] = free
    return budgets


def parse_memory(text: str, gpus: Sequence[int]) -> dict[int, int]:
    """`--max-memory` as bytes by GPU number."""
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    sizes = {}
    for number, mark, size in parts:
        found = parse_size(size)
        plain = mark and number.strip().isdigit()
        if found is None or not (plain or (not mark and len(parts) == 1)):
            raise ConfigError(f"--max-memory {text!r} is not a size such as 20GiB, nor sizes such as 0=10GiB,1=20GiB.")
        for index in [int(number)] if plain else gpus:
            sizes[index] = found
    return sizes


def parse_size(text: str) -> int | None:
    """Bytes of a size such as "20GiB", "512 MB" or "1000"; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    return int(float(match[1]) * MEMORY_UNITS[match[2]]) if match is not None and match[2] in MEMORY_UNITS else None


Parts = Sequence[tuple[tuple[str, ...], int]]


def balanced_device_map(parts: Parts, budgets: Mapping[torch.device, int]) -> Placement:
    """Put `parts` (module names and bytes, in the order they are computed) on as few devices as hold them, in order.

    A device that is too small for the next part is passed over. Among the devices used, loads are evened out.
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
    """One pass over the devices: each takes parts until the next would lie mostly beyond its target."""
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
