"""From a checkpoint directory to a ready engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.engine.engine import Engine


def load_engine(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    max_batch_size: int = 16,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> Engine:
    """Load a checkpoint and wrap it in an engine; `options` go to `Engine`, `loading` to
    `load_pretrained_model`: `vision_tower`, `num_gpus`, `max_memory`, `device_map`, `attn_implementation`, `text_only`,
    `progress`.

    `device` and `dtype` default to what the machine and the checkpoint suggest, see `llava.placement`.
    """
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.placement import resolve_device

    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(model_path),
        None if model_base is None else str(model_base),
        get_model_name_from_path(str(model_path)),
        load_8bit,
        load_4bit,
        device=str(resolve_device(device)),
        dtype=dtype,
        **(loading or {}),
    )
    return Engine(model, tokenizer, image_processor, max_batch_size=max_batch_size, **options)
