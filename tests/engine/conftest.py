"""A tiny chat model, and transformers' `generate` for one request at a time as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.engine import Engine
from llava.model.builder import load_pretrained_model
from tests.threads import one_thread
from tests.tiny import make_chat

__all__ = ["one_thread"]  # a fixture for every test below

Solo = Callable[[Sequence[int], Sequence[Tensor], int], tuple[int, ...]]


@pytest.fixture(scope="session")
def parts(tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image_processor) in float32 on the CPU.

    The weights are large, so that every position and image changes the tokens; usual ones would hide errors. The head
    size is 16, the vector size of the C++ kernel.
    """
    lively = tmp_path_factory.mktemp("lively") / "chat"
    directory = make_chat(lively, tiny_dirs["tower"], initializer_range=0.25, hidden_size=64)
    tokenizer, model, processor, _ = load_pretrained_model(directory, device="cpu")
    return model, tokenizer, processor


@pytest.fixture
def make_engine(parts: tuple[Any, Any, Any]) -> Callable[..., Engine]:
    return lambda **options: Engine(*parts, **options)


@pytest.fixture(scope="session")
def bytes_per_token(parts: tuple[Any, Any, Any]) -> int:
    """Bytes of the keys and values of one token."""
    return Engine(*parts).model_runner.spec.bytes_per_token


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(max_batch_size=4)


@pytest.fixture(scope="session")
def solo(parts: tuple[Any, Any, Any]) -> Solo:
    """New tokens of greedy `model.generate` on one prompt alone."""
    return greedy(parts[0])


def greedy(model: Any) -> Solo:
    """New tokens of greedy `model.generate` on one prompt alone."""

    @torch.no_grad()
    def generate(ids: Sequence[int], images: Sequence[Tensor], max_new_tokens: int) -> tuple[int, ...]:
        extra = {"images": torch.stack(list(images))} if images else {}
        output = model.generate(
            torch.tensor([list(ids)]), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=2, **extra
        )
        return tuple(output[0, len(ids) :].tolist())

    return generate
