"""Memory limits of an engine's caches: as given, else from the free memory of the model's devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from llava.engine.cache import CacheSpec

_MIB: Final = 2**20
_STORE_BYTES: Final = 512 * _MIB  # of the prefix cache and of the feature cache where free memory is unknown
_PREFILL_TOKENS: Final = 8192
_LEAST_PREFILL_TOKENS: Final = 512
# Fractions of the free memory. A KV cache that grows by half holds 1.67 times its final size for a moment; what is left
# is for activations.
_KV_SHARE: Final = 0.35
_PREFIX_SHARE: Final = 0.2
_FEATURE_SHARE: Final = 0.02
_PREFILL_SHARE: Final = 0.1
_CONTEXT_SHARE: Final = 0.45  # of the KV cache where its usual share does not hold one full context
_LEAST_PREFIX_SHARE: Final = 0.05
_CACHES_SHARE: Final = 0.85  # of both, while the KV cache grows
_GROWTH: Final = 5 / 3


@dataclass(frozen=True)
class CacheBounds:
    """Bytes of the KV cache of running requests (None: unlimited), of the prefix cache and of the feature cache, and
    prompt tokens of one forward pass."""

    kv: int | None
    prefix: int
    features: int
    prefill_tokens: int = _PREFILL_TOKENS


def cache_bounds(
    spec: CacheSpec,
    kv: int | None = None,
    prefix: int | None = None,
    features: int | None = None,
    prefill_tokens: int | None = None,
) -> CacheBounds:
    """The bounds given, and defaults for the rest.

    On CUDA the defaults follow from the memory that is free now, after the weights were loaded; the KV cache holds at
    least one full context where that leaves room. A model split over GPUs is limited by the one with the least free
    memory per layer.
    """
    default = CacheBounds(None, _STORE_BYTES, _STORE_BYTES)
    if spec.device.type == "cuda" and None in (kv, prefix, features, prefill_tokens):
        default = _from_free_memory(spec, free_memory)
    return CacheBounds(
        default.kv if kv is None else kv,
        default.prefix if prefix is None else prefix,
        default.features if features is None else features,
        default.prefill_tokens if prefill_tokens is None else prefill_tokens,
    )


def _from_free_memory(spec: CacheSpec, free: Callable[[torch.device], int]) -> CacheBounds:
    layers = Counter(spec.layer_devices or (spec.device,) * spec.layers)
    room = min(free(device) * spec.layers // count for device, count in layers.items())  # for keys and values
    context = (spec.context_length or 0) * spec.column_bytes
    prefill = int(_PREFILL_SHARE * room) // spec.column_bytes  # its keys and values are copied to the KV cache later
    kv = max(int(_KV_SHARE * room), min(context, int(_CONTEXT_SHARE * room)))
    prefix = max(_LEAST_PREFIX_SHARE, min(_PREFIX_SHARE, _CACHES_SHARE - _GROWTH * kv / room)) if room else 0.0
    return CacheBounds(
        kv=kv,
        prefix=int(prefix * room),
        features=min(4 * _STORE_BYTES, int(_FEATURE_SHARE * free(spec.device))),
        prefill_tokens=max(_LEAST_PREFILL_TOKENS, min(_PREFILL_TOKENS, prefill)),
    )


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, including memory that PyTorch has reserved but not allocated."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def format_size(size: int) -> str:
    """Bytes as GiB, or as MiB below 1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / _MIB:.1f} MiB"
