"""The tower registry, and finding a tower: its own `config.json` decides what it is (spec/model.md §2.1, M1).

Adding a tower takes one module that defines `TOWER = TowerSpec(...)` and one line in `TOWERS`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llava.errors import CheckpointError
from llava.model.checkpoint import read_json
from llava.model.hub import snapshot

TOWERS = {
    "intern_vit_6b": "llava.model.multimodal_encoder.intern_vit_6b",
    "clip_vision_model": "llava.model.multimodal_encoder.clip_encoder",
    "clip": "llava.model.multimodal_encoder.clip_encoder",
    "internvl": "llava.model.multimodal_encoder.internvl_14b",
}
ENVIRONMENT = "LLAVA_VISION_TOWER"


@dataclass(frozen=True)
class TowerSpec:
    """What the wrapper needs to know of one kind of tower.

    `config(settings)` parses the tower's `config.json`; `build(config, depth)` makes the module, whose forward takes
    `(B, 3, H, W)` pixels and returns an object with `last_hidden_state` `(B, 1 + N, C)` after `depth` layers (and
    `query_features`, where the tower has `queries`); `processor(directory, size)` makes the image processor;
    `vision(config)` is the part of the configuration that describes the vision transformer. Keys that start with
    `layers` and an index are its layers (`None`: all are needed); keys that start with one of `unused` never reach
    the features; `positions` is the key of the position table.
    """

    config: Callable[[dict[str, Any]], Any]
    build: Callable[[Any, int], nn.Module]
    processor: Callable[[Path | None, int | None], Any]
    layers: str | None
    positions: str
    unused: tuple[str, ...] = ()
    vision: Callable[[Any], Any] = lambda config: config
    queries: Callable[[Any], int] = lambda config: 0


def tower_spec(settings: dict[str, Any], source: str) -> TowerSpec:
    """The registered kind for a tower's configuration; an unknown `model_type` lists the known ones."""
    model_type = str(settings.get("model_type"))
    if model_type not in TOWERS:
        raise CheckpointError(
            f"The vision tower {source!r} is of type {model_type!r}, which is not one of {', '.join(sorted(TOWERS))}; "
            "pass another --vision_tower."
        )
    spec: TowerSpec = importlib.import_module(TOWERS[model_type]).TOWER
    return spec


def find_tower(name: str, checkpoint_dir: Path | None = None) -> Path:
    """The local directory of tower `name`; searched in the order of VT-2, and every place tried is in the error.

    Order: `LLAVA_VISION_TOWER`, the path as given, the path and then its last component relative to the checkpoint
    and beside it, the Hugging Face cache, the hub (unless offline).
    """
    name = os.environ.get(ENVIRONMENT) or name
    candidates = [Path(name)]
    if checkpoint_dir is not None:
        last = Path(name.rstrip("/")).name
        candidates += [checkpoint_dir / name, checkpoint_dir / last, checkpoint_dir.resolve().parent / last]
    for place in candidates:
        if os.path.isfile(place / "config.json"):  # noqa: PTH113 (as in checkpoint.require_directory)
            return place
    found, asked = snapshot(name, ["*.json", "*.safetensors", "*.bin"])
    if found is None:
        places = dict.fromkeys([*map(str, candidates), *asked])
        raise CheckpointError(
            f"The vision tower {name!r} was not found; tried {', '.join(places)}. Download it and pass its directory "
            f"with --vision-tower (or {ENVIRONMENT})."
        )
    return found


def read_tower_settings(directory: Path) -> dict[str, Any]:
    """`config.json` of a tower directory, reduced to its `vision_config` when it is a composite one."""
    settings = read_json(directory / "config.json")
    if "vision_config" in settings and settings.get("model_type") in ("clip", "intern_vit_6b"):
        settings = {"model_type": settings["model_type"], **settings["vision_config"]}
    return settings


def build_vision_tower(config: Any, checkpoint_dir: Path | None = None, *, delay_load: bool = True) -> nn.Module:
    """The tower wrapper for a model configuration or the model arguments (`mm_vision_tower`, else `vision_tower`)."""
    from llava.model.multimodal_encoder.tower import VisionTower

    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not name:
        raise CheckpointError("No vision tower is named: the configuration lacks mm_vision_tower.")
    tower = VisionTower(str(name), config, checkpoint_dir=checkpoint_dir)
    if not delay_load:
        tower.load_model()
    return tower
