"""The C++ decode kernel computes PyTorch's logits for any batch; without it decoding still works."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.engine.cache import CacheSpec, KVCache
from llava.engine.llama import LlamaRunner
from llava.engine.native import build
from llava.engine.packing import VarlenBatch
from llava.engine.prefix_cache import PrefixCache, PrefixMatch
from tests.engine.test_llama import VARIANTS, make_model

PREFIX = list(range(3, 43))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Clear the cached library before and after the test."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def rows_of(runner: LlamaRunner, lengths: list[int], behind: list[bool]) -> KVCache:
    """Rows of random tokens, some behind a shared prefix, three with 40 tokens of it, three with 27, and so on."""
    node = PrefixCache(2**20).insert((), tuple(PREFIX), [1] * 40, runner.prefill_kv(runner.embed(PREFIX), ()))
    prefixes = [(PrefixMatch(node, 27 if row // 3 % 2 else 40),) if shares else () for row, shares in enumerate(behind)]
    rows = [runner.embed([50 + row + at for at in range(length)]) for row, length in enumerate(lengths)]
    cache = KVCache(runner.spec)
    cache.join(runner.prefill(rows, prefixes)[0], lengths, prefixes)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", sorted({*VARIANTS} - {"gelu"}))
@torch.inference_mode()
def test_logits_and_caches_equal_pytorchs(variant: str, dtype: torch.dtype) -> None:
    model = make_model(**VARIANTS[variant]).to(dtype)
    kernel, plain = LlamaRunner(model), LlamaRunner(model)
    plain.native = None
    assert kernel.native is not None
    lengths, behind = [1, 5, 2, 7, 3, 4, 6], [True, False, True, True, False, True, False]
    caches = [rows_of(runner, lengths, behind) for runner in (kernel, plain)]
    close = {"atol": 2e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.2, "rtol": 0.05}
    for step in range(4):
        ids = [100 + step + 5 * row for row in range(7)]
        got, want = (runner.decode(ids, cache) for runner, cache in zip((kernel, plain), caches, strict=True))
        torch.testing.assert_close(got, want.float(), **close)
    for row in range(7):
        torch.testing.assert_close(caches[0].row(row), caches[1].row(row), **close)


def check_rows_are_independent(runner: LlamaRunner) -> None:
    """Logits of a row are bitwise equal for every batch size."""
    lengths, behind = [3] * 11, [True] * 11
    together = runner.decode(list(range(100, 111)), rows_of(runner, lengths, behind))
    for count in (1, 2, 5, 8):
        cache = rows_of(runner, lengths, behind)
        for row in range(10, count - 1, -1):
            cache.drop(row)
        assert torch.equal(runner.decode(list(range(100, 100 + count)), cache), together[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.inference_mode()
def test_keys_and_values_of_prompts_equal_pytorchs(kv_heads: int, dtype: torch.dtype) -> None:
    """Slots behind the shorter rows are finite, whatever was in that memory."""
    spec = CacheSpec(2, kv_heads, 16, dtype, torch.device("cpu"))
    lengths = [5, 1, 9]
    native, plain = (VarlenBatch(spec, lengths, [()] * 3) for _ in range(2))
    native.data.fill_(torch.nan)
    assert native._store is not None
    plain._store = None
    generator = torch.Generator().manual_seed(kv_heads)
    qkv = torch.randn(15, 4 + 2 * kv_heads, 16, generator=generator).to(dtype)
    rotation = tuple(torch.randn(2, 15, 1, 16, generator=generator).to(dtype))
    got, want = (batch.store(1, qkv.clone(), rotation) for batch in (native, plain))
    error = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.02}
    torch.testing.assert_close(got, want, **error)
    for row, length in enumerate(lengths):
        stored = (batch.data[1, :, row, :, :length] for batch in (native, plain))
        torch.testing.assert_close(*stored, **error)
    assert native.data[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Logits are bitwise equal for every batch size."""
    runner = LlamaRunner(make_model().to(dtype))
    assert runner.native is not None
    check_rows_are_independent(runner)


@torch.inference_mode()
def test_nan_is_preserved() -> None:
    """NaN in the weights reaches the logits and the cache."""
    runner = LlamaRunner(make_model().bfloat16())
    cache = rows_of(runner, [2, 2], [False, False])
    weight = runner.layers[0].qkv.weight
    assert weight is not None
    weight[-1, 0] = torch.nan
    assert not runner.decode([5, 6], cache).isfinite().all()
    assert not cache.row(0)[0, 1, -1, -1].isfinite().all()


@pytest.mark.parametrize("other", [{"hidden_size": 72}, {"intermediate_size": 100}, {"hidden_act": "gelu"}])
def test_unsupported_sizes_and_activations_do_not_use_the_kernel(other: dict[str, Any]) -> None:
    assert LlamaRunner(make_model(**other)).native is None


def test_it_can_be_disabled(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setenv("LLAVA_NATIVE", "0")
    assert LlamaRunner(make_model()).native is None


def test_without_a_compiler_the_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert LlamaRunner(make_model()).native is None


def test_a_failing_compiler_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no room on the disk" >&2; exit 1; }\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert build.library() is None and build.library() is None
    assert [record.getMessage().partition("built by")[2] for record in caplog.records] == [
        f" {broken}: no room on the disk"
    ]
    assert not list((tmp_path / "cache" / "llava" / "native").iterdir())


def test_a_directory_that_others_can_write_to_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = build.cache_directory()
    assert root == tmp_path / "llava" / "native"
    root.chmod(0o777)
    assert build.cache_directory() is None
