"""Attention backends, vision tower and LLaMA layers in 16-bit precision, against float64 on the same inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.full_size import FULL, make_model
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.golden import exact_float32
from benchmarks.gpu.models import QUICK, pixels_of
from llava.engine.attention import SharedPrefix, aligned_mask, attend, attention_with_lse, select_kernel
from llava.engine.llama import build_model_runner

BACKENDS: Final = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
Inputs = tuple[Tensor, Tensor, Tensor]
# Largest relative error ||out - reference|| / ||reference||.
ERROR: Final = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYERS: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # through a few layers


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||; infinity if any value is not finite."""
    if not found.isfinite().all():
        return math.inf
    return float((found.double() - reference).norm() / reference.norm())


def attention(bench: Bench) -> None:
    """PyTorch's attention by backend and dtype, and the engine's, which also returns the log-sum-exp."""
    heads, tokens = (2, 33) if bench.quick else (32, 640)
    dtypes = [torch.float32] if not bench.cuda else [torch.float32, torch.float16, torch.bfloat16]
    with exact_float32():
        for causal in (False, True):
            for dtype in dtypes:
                shape = (2, heads, tokens, 128)
                query, key, value = (torch.randn(shape, device=bench.device, dtype=dtype) for _ in range(3))
                inputs = query, key, value
                reference = _reference(query, key, value, causal)[0]
                kind = f"{str(dtype).removeprefix('torch.')}{', causal' if causal else ''}"
                chosen = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
                _judge(bench, f"attention, PyTorch default, {kind}", chosen, reference, ERROR[dtype])
                for name, backend in BACKENDS.items():
                    _backend(bench, f"attention, {name}, {kind}", backend, inputs, causal, reference, ERROR[dtype])
                _engine_attention(bench, kind, inputs, causal, ERROR[dtype])
                if not causal:
                    _shared_prefix(bench, kind, inputs, ERROR[dtype])


def _reference(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    if mask is not None:
        scores = scores + mask.double()
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp() @ value, lse


def _backend(
    bench: Bench, what: str, backend: SDPBackend, inputs: Inputs, causal: bool, reference: Tensor, limit: float
) -> None:
    try:
        with sdpa_kernel(backend):
            query, key, value = inputs
            found = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    except RuntimeError as error:
        bench.skip(what, f"this backend does not run here ({str(error).splitlines()[0][:80]})")
        return
    _judge(bench, what, found, reference, limit)


def _engine_attention(bench: Bench, kind: str, inputs: Inputs, causal: bool, limit: float) -> None:
    """The engine's kernels with their log-sum-exp, plain or causal and with rows padded on the left."""
    query, key, value = inputs
    masks: dict[str, Tensor | None] = {"": None}
    if not causal:
        hidden = torch.tensor([0, 7], device=bench.device)[:, None, None, None]
        masks[", padded"] = aligned_mask(lambda at: at >= hidden, key.shape[2], key.dtype, bench.device)
    for padded, mask in masks.items():
        _, name = select_kernel(bench.device, query.dtype, query.shape[-1], masked=mask is not None)
        what = f"engine attention, {name}, {kind}{padded}"
        out, lse = _reference(query, key, value, causal, mask)
        found, found_lse = attention_with_lse(query, key, value, mask, causal=causal)
        _judge(bench, what, found, out, limit)
        _judge(bench, f"{what}: log-sum-exp", found_lse, lse, limit)


def _shared_prefix(bench: Bench, kind: str, inputs: Inputs, limit: float) -> None:
    """One query per row after a prefix shared by both rows, merged with each row's own keys."""
    query, key, value = inputs
    half = key.shape[2] // 2
    prefix = torch.stack([key[0, :, :half], value[0, :, :half]]).unsqueeze(0)  # (1, 2, h, P, D)
    own = key[:, :, half:], value[:, :, half:]
    whole = [torch.cat([prefix[0, k].expand(2, -1, -1, -1), part], dim=2) for k, part in enumerate(own)]
    expected, _ = _reference(query[:, :, :1], whole[0], whole[1], causal=False)
    found = attend(query[:, :, :1], *own, None, [SharedPrefix(slice(0, 2), prefix)], 0)
    _judge(bench, f"engine attention after a shared prefix, {kind}", found, expected, limit)


def _judge(bench: Bench, what: str, found: Tensor, reference: Tensor, limit: float) -> None:
    error = relative_error(found, reference)
    bench.check(what, error < limit, f"{error:.2g}", f"relative error, below {limit:g}")


@torch.no_grad()
def layers(bench: Bench) -> None:
    """Three tower layers and two LLaMA layers at full width in 16-bit precision, by the engine and transformers."""
    size = QUICK if bench.quick else replace(FULL, layers=2, tower_layers=6)
    bench.require_memory(0 if bench.quick else 14 * GIB, "layers of full width in 16-bit precision and float64")
    torch.manual_seed(0)
    model = make_model(bench.device, bench.dtype, pixels=pixels_of(bench), size=size)
    exact = copy.deepcopy(model).double()
    _refresh_rotary(exact)
    limit, kind = LAYERS[bench.dtype], str(bench.dtype).removeprefix("torch.")
    images = torch.randn(2, 3, pixels_of(bench), pixels_of(bench), device=bench.device, dtype=bench.dtype)
    reference = exact.encode_images(images.double())
    _judge(bench, f"tower and projector in {kind}", model.encode_images(images), reference, limit)
    ids = torch.randint(300, size.vocabulary, (1, 32 if bench.quick else 640), device=bench.device)
    embeds = model.get_input_embeddings()(ids)
    reference = exact(inputs_embeds=embeds.double(), use_cache=False).logits[0, -1]
    found = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
    _judge(bench, f"LLaMA layers in {kind}, transformers forward", found, reference, limit)
    runner = build_model_runner(model)
    with torch.inference_mode():
        _, states = runner.prefill([embeds[0]], [()])
        found = runner.logits(states)[0]
    _judge(bench, f"LLaMA layers in {kind}, engine prefill", found.clone(), reference, limit)


def _refresh_rotary(model: Any) -> None:
    """Recompute the rotary tables of transformers' layers in float64; a cast alone would keep the rounded cache."""
    for module in model.modules():
        refresh: Callable[..., None] | None = getattr(module, "_set_cos_sin_cache", None)
        if refresh is not None and hasattr(module, "max_seq_len_cached"):
            refresh(seq_len=module.max_seq_len_cached, device=model.device, dtype=torch.float64)


def numerics(bench: Bench) -> None:
    attention(bench)
    with exact_float32():
        layers(bench)
