"""Shared fixtures: the tiny checkpoints (made once a session) and guards against leaking global state."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests import tiny

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; tests send Ctrl-C to programs
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
SHARED = Path(os.environ.get("LLAVA_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`{"tower": …, "base": …, "chat": …}`: read-only directories, see `tests.tiny`. Copy before changing."""
    return tiny.make_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The public golden data; tests that need it skip where it is absent."""
    path = SHARED / "golden"
    if not path.is_dir():
        pytest.skip(f"no golden data at {path}")
    return path


@pytest.fixture(scope="session")
def vicuna_tokenizer_file() -> Path:
    """Vicuna's own SentencePiece file (LLaMA licence, never part of this project)."""
    path = SHARED / "tokenizer" / "llama2" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}")
    return path


@pytest.fixture(autouse=True)
def _restore_global_state() -> Iterator[None]:
    """A test may change the default dtype, the seed or the default template; the next one must not notice."""
    import llava.conversation as conversation
    from llava.placement import is_ampere

    is_ampere.cache_clear()  # tests stand in for several GPUs
    dtype, template = torch.get_default_dtype(), conversation.default_conversation
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    conversation.default_conversation = template
