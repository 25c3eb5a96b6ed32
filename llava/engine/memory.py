"""Memory limits of the engine's caches, by default from the free memory of the model's devices."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

import torch

from llava.engine.cache import CacheSpec

_MIB: Final = 2**20
_STORE_BYTES: Final = 512 * _MIB  # prefix cache and feature cache on other devices than CUDA
_PREFILL_TOKENS: Final = 8192
_LEAST_PREFILL_TOKENS: Final = 512
# Fractions of the free memory; the rest is for activations. A KV cache that grows by half temporarily takes 5/3 of its
# final size.
_KV_SHARE: Final = 0.35
_PREFIX_SHARE: Final = 0.2
_FEATURE_SHARE: Final = 0.02
_PREFILL_SHARE: Final = 0.1
_CONTEXT_SHARE: Final = 0.45  # KV cache, if `_KV_SHARE` does not hold one full context
_LEAST_PREFIX_SHARE: Final = 0.05
_CACHES_SHARE: Final = 0.85  # KV and prefix cache while the former grows
_GROWTH: Final = 5 / 3


@dataclass(frozen=True)
class CacheBounds:
    """Bytes of the KV cache (None: unlimited), prefix cache and feature cache, and prompt tokens per forward pass."""

    kv: int | None = None
    prefix: int = _STORE_BYTES
    features: int = _STORE_BYTES
    prefill_tokens: int = _PREFILL_TOKENS


def cache_bounds(
    spec: CacheSpec,
    kv: int | None = None,
    prefix: int | None = None,
    features: int | None = None,
    prefill_tokens: int | None = None,
) -> CacheBounds:
    """Complete the given bounds with defaults.

    On CUDA the defaults are fractions of the currently free memory; the KV cache holds at least one full context if
    that leaves room. A model split over GPUs is limited by the GPU with the least free memory per layer.
    """
    bounds = {"kv": kv, "prefix": prefix, "features": features, "prefill_tokens": prefill_tokens}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    free = spec.device.type == "cuda" and len(given) < len(bounds)
    return replace(_from_free_memory(spec) if free else CacheBounds(), **given)


def _from_free_memory(spec: CacheSpec) -> CacheBounds:
    layers = Counter(spec.layer_devices or (spec.device,) * spec.layers)
    room = min(free_memory(device) * spec.layers // count for device, count in layers.items())
    context = (spec.context_length or 0) * spec.bytes_per_token
    prefill = int(_PREFILL_SHARE * room) // spec.bytes_per_token  # its keys and values exist beside the KV cache
    kv = max(int(_KV_SHARE * room), min(context, int(_CONTEXT_SHARE * room)))
    prefix = max(_LEAST_PREFIX_SHARE, min(_PREFIX_SHARE, _CACHES_SHARE - _GROWTH * kv / room)) if room else 0.0
    return CacheBounds(
        kv=kv,
        prefix=int(prefix * room),
        features=min(4 * _STORE_BYTES, int(_FEATURE_SHARE * free_memory(spec.device))),
        prefill_tokens=max(_LEAST_PREFILL_TOKENS, min(_PREFILL_TOKENS, prefill)),
    )


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, including memory that PyTorch has reserved but not allocated."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def format_size(size: int) -> str:
    """Bytes as GiB, or as MiB below 1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / _MIB:.1f} MiB"
