"""Tiny checkpoints of every kind, and a simulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.model.builder import load_pretrained_model
from tests import devices, tiny
from tests.threads import one_thread

__all__ = ["one_thread"]

# Large weights, so that every position and image affects the tokens; head size 16.
LIVELY = {"initializer_range": 0.25, "hidden_size": 64}
Parts = tuple[Any, Any, Any]


@pytest.fixture
def card() -> Iterator[devices.Card]:
    with devices.simulated_cuda() as card:
        yield card


@pytest.fixture(scope="session")
def checkpoints(tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Paths of each checkpoint and its base (None for a complete one), by name."""
    root = tmp_path_factory.mktemp("cuda")
    tower = tiny_dirs["tower"]
    chat = tiny.make_chat(root / "chat", tower, **LIVELY)
    base = tiny.make_base(root / "base", **LIVELY)
    clip = tiny.make_chat(root / "clip", tiny.make_clip_tower(root / "clip-tower"), **LIVELY, mm_vision_select_layer=-2)
    return {
        "llama": (chat, None),
        "mpt": (tiny.make_mpt_chat(root / "mpt", tower), None),
        "clip": (clip, None),
        "projector": (tiny.make_projector_only(root / "projector", chat), base),
        "lora": (tiny.make_lora(root / "lora", chat, base), base),
    }


KINDS = {
    "llama sdpa": ("llama", {}),
    "llama eager": ("llama", {"attn_implementation": "eager"}),
    "mpt": ("mpt", {}),
    "clip tower": ("clip", {}),
    "projector": ("projector", {}),
    "lora": ("lora", {}),
}


def load(checkpoints: dict[str, tuple[Path, Any]], kind: str, device: str, **options: Any) -> Parts:
    """(model, tokenizer, image processor) of a kind, in float32 unless `dtype` is given."""
    name, settings = KINDS[kind]
    path, base = checkpoints[name]
    tokenizer, model, processor, _ = load_pretrained_model(
        path, base, device=device, **{"dtype": "float32", **settings, **options}
    )
    return model, tokenizer, processor
