"""Memory bounds of the engine's caches: defaults from free memory, flags, and models split over devices."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from llava.engine import cache
from llava.engine.arguments import EngineArgs
from llava.engine.cache import CacheBounds, CacheSpec, cache_bounds

GIB = 2**30
CPU = CacheSpec(layers=32, kv_heads=32, head_dim=128, dtype=torch.bfloat16, device=torch.device("cpu"))  # 512 KiB
GPU = replace(CPU, device=torch.device("cuda", 0), context_length=2048)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Free bytes by GPU index, set by the test."""
    room: dict[int, int] = {}
    monkeypatch.setattr(cache, "free_memory", lambda device: room[device.index])
    return room


def test_defaults_on_the_cpu() -> None:
    assert cache_bounds(CPU) == CacheBounds(None, 512 * 2**20, 512 * 2**20)
    assert cache_bounds(CPU, kv=5, features=0) == CacheBounds(5, 512 * 2**20, 0)


def test_defaults_on_cuda_are_fractions_of_free_memory(free: dict[int, int]) -> None:
    free[0] = 100 * GIB
    assert cache_bounds(GPU) == CacheBounds(int(0.35 * 100 * GIB), 20 * GIB, int(0.02 * 100 * GIB))
    assert cache_bounds(GPU, 1, 2, 3, 4) == CacheBounds(1, 2, 3, 4)
    free[0] = 1000 * GIB
    assert cache_bounds(GPU).features == 2 * GIB  # hundreds of images


def test_the_kv_cache_holds_a_full_context_if_there_is_room(free: dict[int, int]) -> None:
    free[0] = int(2.5 * GIB)  # 35 % of it would hold 1,792 tokens
    assert cache_bounds(GPU).kv == 2048 * GPU.bytes_per_token == GIB
    free[0] = GIB
    assert cache_bounds(GPU).kv == int(0.45 * GIB)
    assert cache_bounds(GPU).prefix == pytest.approx(0.1 * GIB, rel=1e-6)  # a growing KV cache exists twice
    free[0] = 0
    assert cache_bounds(GPU).kv == cache_bounds(GPU).prefix == 0


def test_a_prefill_leaves_room_on_a_small_gpu(free: dict[int, int]) -> None:
    """Its own keys and values exist beside the KV cache until they are copied into it."""
    free[0] = 100 * GIB
    assert cache_bounds(GPU).prefill_tokens == 8192
    free[0] = 10 * GIB
    assert cache_bounds(GPU).prefill_tokens == GIB // GPU.bytes_per_token == 2048
    free[0] = GIB // 2
    assert cache_bounds(GPU).prefill_tokens == 512


def test_the_fullest_gpu_limits_a_split_model(free: dict[int, int]) -> None:
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    split = replace(GPU, layer_devices=(gpus[0],) * 8 + (gpus[1],) * 24)
    free.update({0: 10 * GIB, 1: 24 * GIB})
    assert cache_bounds(split).prefix == int(0.2 * 32 * GIB)  # 24 of 32 layers are on the second
    free[0] = 4 * GIB
    assert cache_bounds(split).prefix == int(0.2 * 16 * GIB)


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    EngineArgs.add_cli_args(parser)
    path = ["--model-path", "checkpoint"]
    args = parser.parse_args([*path, "--kv-cache-memory", "8GiB", "--prefix-cache-memory", "512 MB"])
    assert EngineArgs.from_cli_args(args, max_batch_size=3) == EngineArgs(
        "checkpoint", kv_cache_memory=8 * GIB, prefix_cache_memory=512 * 10**6, max_batch_size=3
    )
    assert EngineArgs.from_cli_args(argparse.Namespace(model_path="checkpoint")) == EngineArgs("checkpoint")
    assert "35 % of the memory that is free after loading" in " ".join(parser.format_help().split())
    with pytest.raises(SystemExit):
        parser.parse_args([*path, "--kv-cache-memory", "much"])
    assert "expected a size such as 8GiB or 512MiB, got 'much'" in capsys.readouterr().err


def test_engine_args_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("llava.engine.engine.load_engine", lambda *paths, **options: calls.append(options))
    args = EngineArgs(
        "checkpoint", image_aspect_ratio="pad", feature_cache_memory=7, vision_tower="tower", text_only=True
    )
    args.build_engine()
    EngineArgs("checkpoint").build_engine(progress=print)
    assert calls[0]["image_aspect_ratio"] == "pad" and calls[1]["image_aspect_ratio"] is None
    assert calls[0]["feature_cache_bytes"] == 7 and calls[0]["max_batch_size"] == 16
    loading = calls[0]["loading"]
    assert isinstance(loading, dict) and loading["vision_tower"] == "tower" and loading["text_only"]
