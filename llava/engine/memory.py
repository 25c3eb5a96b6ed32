"""Memory bounds of an engine's caches: as asked for, else from what is free on the devices of the model."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from llava.engine.cache import CacheSpec
from llava.placement import parse_size

_MIB: Final = 2**20
_STORE_BYTES: Final = 512 * _MIB  # of the prefix cache, and of the feature cache, on a device that does not tell
# Shares of the free memory. What is left is for activations, and for the second KV buffer while one grows.
_KV_SHARE: Final = 0.35
_PREFIX_SHARE: Final = 0.2
_FEATURE_SHARE: Final = 0.02
_MOST_OF_IT: Final = 0.7
_FLAGS: Final = {
    "kv_cache_memory": "keys and values of running requests; further requests wait (default: 35 %% of the free memory "
    "on CUDA, no bound elsewhere)",
    "prefix_cache_memory": "keys and values of prompt prefixes kept for later requests (default: 20 %% of the free "
    "memory on CUDA, else 512MiB)",
    "feature_cache_memory": "image features kept for later requests (default: 2 %% of the free memory on CUDA, else "
    "512MiB)",
}


@dataclass(frozen=True)
class CacheBounds:
    """Bytes that the KV cache of running rows (None: no bound), the prefix cache and the feature cache may take."""

    kv: int | None
    prefix: int
    features: int


def cache_bounds(
    spec: CacheSpec, kv: int | None = None, prefix: int | None = None, features: int | None = None
) -> CacheBounds:
    """The bounds given, and defaults for the rest.

    On CUDA they follow from the memory that is free now, after the weights were loaded; the KV cache holds at least
    one full context where that leaves room. A model that is split over devices is bounded by the fullest of them.
    """
    default = CacheBounds(None, _STORE_BYTES, _STORE_BYTES)
    if spec.device.type == "cuda" and None in (kv, prefix, features):
        default = _from_free_memory(spec, free_memory)
    return CacheBounds(
        default.kv if kv is None else kv,
        default.prefix if prefix is None else prefix,
        default.features if features is None else features,
    )


def _from_free_memory(spec: CacheSpec, free: Callable[[torch.device], int]) -> CacheBounds:
    layers = Counter(spec.layer_devices or (spec.device,) * spec.layers)
    room = min(free(device) * spec.layers // count for device, count in layers.items())  # for keys and values
    context = (spec.context_length or 0) * spec.column_bytes
    return CacheBounds(
        kv=max(int(_KV_SHARE * room), min(context, int(_MOST_OF_IT * room))),
        prefix=int(_PREFIX_SHARE * room),
        features=min(4 * _STORE_BYTES, int(_FEATURE_SHARE * free(spec.device))),
    )


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, those included that torch's allocator holds without using them."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """How much memory the engine's caches may take."""
    for name, text in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_size, metavar="SIZE", help=f"such as 8GiB: {text}")


def cache_options(args: argparse.Namespace | Mapping[str, Any]) -> dict[str, int | None]:
    """Keyword arguments of `Engine`, from flags that may be absent."""
    values = args if isinstance(args, Mapping) else vars(args)
    return {name.replace("memory", "bytes"): values.get(name) for name in _FLAGS}


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GiB or 512MiB")
    return size
