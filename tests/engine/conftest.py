"""The tiny chat model, loaded once, and the way to compare with: the library's `generate`, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.engine import Engine
from llava.model.builder import load_pretrained_model

Solo = Callable[[Sequence[int], Sequence[Tensor], int], tuple[int, ...]]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run many times faster on one thread when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def parts(tiny_dirs: dict[str, Path]) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image_processor) in float32 on the CPU."""
    tokenizer, model, processor, _ = load_pretrained_model(tiny_dirs["chat"], device="cpu")
    return model, tokenizer, processor


@pytest.fixture
def make_engine(parts: tuple[Any, Any, Any]) -> Callable[..., Engine]:
    return lambda **options: Engine(*parts, **options)


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(max_batch_size=4)


@pytest.fixture(scope="session")
def solo(parts: tuple[Any, Any, Any]) -> Solo:
    """New tokens of greedy `model.generate` on one prompt alone."""
    model = parts[0]

    @torch.no_grad()
    def generate(ids: Sequence[int], images: Sequence[Tensor], max_new_tokens: int) -> tuple[int, ...]:
        extra = {"images": torch.stack(list(images))} if images else {}
        output = model.generate(
            torch.tensor([list(ids)]), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=2, **extra
        )
        return tuple(output[0, len(ids) :].tolist())

    return generate
