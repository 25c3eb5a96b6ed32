"""Vision tower of a chat model: lookup, strict loading, and feature selection.

Nothing is looked up until it is needed. Layers above `mm_vision_select_layer` are neither loaded nor run.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llava.errors import CheckpointError, ConfigError
from llava.model.checkpoint import (
    TOWER_PREFIXES,
    check_depth,
    config_errors,
    has_weights,
    iter_tensors,
    layer_index,
    read_json,
    weight_shapes,
)
from llava.model.config import check_settings
from llava.model.hub import snapshot
from llava.model.registry import TowerSpec, tower_spec, tower_type
from llava.model.weights import empty_weights, load_weights

logger = logging.getLogger(__name__)
ENVIRONMENT = "LLAVA_VISION_TOWER"
TIMM = "timm/"
FEATURES = ("patch", "cls_patch")
LONGEST_SIDE = 4096  # pixels
Features = Tensor | tuple[Tensor, Tensor]
TowerLayers = Sequence[Callable[[Tensor], Tensor]]  # (K, T, C) to (K, T, C) each
Shapes = dict[str, tuple[int, ...]]


class _FirstLayer(Exception):
    """Raised in place of the tower's first layer; its arguments are those of the layer, as (args, kwargs)."""


class TowerArguments(Protocol):
    """Settings of a `VisionTower`: a chat model's configuration or training arguments.

    Also read if present: `mm_vision_select_feature`, `mm_vision_image_size` (pixels), and `mm_vision_tower_config` (the
    tower's settings as stored in a chat checkpoint).
    """

    @property
    def mm_vision_select_layer(self) -> int: ...


class VisionTower(nn.Module):
    """Encode images `(K, 3, S, S)` to features `(K, n, C)`; `.vision_tower` is the model after `load_model`.

    Args:
        name: directory, hub name, or `timm/NAME[:FILE]`.
        args: the settings listed in `TowerArguments`.
        checkpoint_dir: the chat checkpoint, which may contain the tower's weights or lie beside them.
    """

    def __init__(self, name: str, args: TowerArguments, *, checkpoint_dir: Path | None = None) -> None:
        super().__init__()
        self.name = name
        with config_errors(checkpoint_dir or name):
            self.select_layer = int(args.mm_vision_select_layer)
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in FEATURES:
            raise ConfigError(f"mm_vision_select_feature={self.select_feature!r} is not one of {', '.join(FEATURES)}.")
        self.image_size: int | None = getattr(args, "mm_vision_image_size", None)
        self.checkpoint_dir = checkpoint_dir
        stored = getattr(args, "mm_vision_tower_config", None)
        self._settings: dict[str, Any] | None = stored if isinstance(stored, dict) else None
        self._loaded_from: tuple[Path, str] | None = None

    # --- Configuration --------------------------------------------------------------------------------------------

    @cached_property
    def directory(self) -> Path | None:
        """The tower's directory or weights file; `None` when only its settings are known (of a checkpoint, of timm)."""
        try:
            return find_tower(self.name, self.checkpoint_dir)
        except CheckpointError:
            if self._settings is None and not self.name.startswith(TIMM):
                raise
            return None

    @cached_property
    def settings(self) -> dict[str, Any]:
        if self._settings is not None:
            return self._settings
        return read_tower_settings(self.name, self.directory)

    @cached_property
    def spec(self) -> TowerSpec:
        with config_errors(self.name):
            spec = tower_spec(self.settings, self.name)
        if self.select_feature == "cls_patch" and not spec.class_token:
            raise ConfigError(
                f"mm_vision_select_feature='cls_patch' needs a class token, which the vision tower {self.name!r} does "
                "not have; use 'patch'."
            )
        return spec

    @cached_property
    def config(self) -> Any:
        """The tower's own configuration, with the number of layers of the whole tower."""
        with config_errors(self.name):
            config = self.spec.config(self.settings)
            vision = self.spec.vision(config)
            if isinstance(vision, PretrainedConfig):
                settings = self.settings if vision is config else self.settings.get("vision_config") or {}
                check_settings(settings, type(vision), f"the vision tower {self.name!r}", self.spec.settings)
        for key in ("hidden_size", "num_hidden_layers", "patch_size"):
            value = getattr(vision, key, None)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"The vision tower {self.name!r} has {key}={value!r} in its configuration.")
        return config

    @cached_property
    def depth(self) -> int:
        """The number of layers to run; the selected features are entry `depth` of the L + 1 hidden states."""
        layers = int(self.spec.vision(self.config).num_hidden_layers)
        depth = self.select_layer + (layers + 1 if self.select_layer < 0 else 0)
        if not 0 <= depth <= layers:
            raise ConfigError(
                f"mm_vision_select_layer={self.select_layer} does not exist in {self.name!r} with its {layers} layers."
            )
        return depth

    @cached_property
    def image_processor(self) -> Any:
        directory = self.directory if self.directory is not None else Path(self.name)
        with config_errors(self.checkpoint_dir or self.name):
            processor = self.spec.processor(directory, self.image_size)
            sides = sorted(processor.crop_size[side] for side in ("height", "width"))
        if not self.spec.vision(self.config).patch_size <= sides[0] <= sides[1] <= LONGEST_SIDE:
            raise CheckpointError(
                f"The vision tower {self.name!r} would get images of {sides[0]} to {sides[1]} px; correct "
                "mm_vision_image_size, or the tower's preprocessor_config.json."
            )
        return processor

    @property
    def is_loaded(self) -> bool:
        return hasattr(self, "vision_tower")

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def image_hidden_size(self) -> int:
        """Width of the patch features; differs from `hidden_size` for towers with queries."""
        return int(self.spec.vision(self.config).hidden_size)

    @property
    def num_patches(self) -> int:
        """The number of patches of one image at the size the image processor produces."""
        crop, patch = self.image_processor.crop_size, self.spec.vision(self.config).patch_size
        return int((crop["height"] // patch) * (crop["width"] // patch))

    @property
    def feature_shapes(self) -> list[tuple[int, int]]:
        """(tokens, width) of the features of one image: of its patches, then of its queries if the tower has any."""
        shapes = [(self.num_patches + (self.select_feature == "cls_patch"), self.image_hidden_size)]
        queries = self.spec.queries(self.config)
        return [*shapes, (queries, self.hidden_size)] if queries else shapes

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    # --- Loading --------------------------------------------------------------------------------------------------

    def load_model(
        self,
        device_map: object = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        from_checkpoint: bool = True,
    ) -> None:
        """Load the weights up to the selected layer, strictly, and freeze them.

        With `from_checkpoint`, weights in the chat checkpoint are preferred when the set is complete; otherwise the
        tower's own weights are read. `device_map` is accepted for compatibility and ignored.
        """
        if self.is_loaded:
            return
        source, prefix, rows = self.source(from_checkpoint)
        model = self.empty(source, rows)
        tensors = (
            (name.removeprefix(prefix), tensor)
            for name, tensor in iter_tensors(source, lambda name: name.startswith(prefix) and self.needs(name, prefix))
        )
        load_weights(model, tensors, dtype=dtype or torch.float32, device=device or "cpu", source=str(source),
                     optional=self.spec.unused)  # fmt: skip
        self.vision_tower = model.requires_grad_(False).eval()
        self._loaded_from = (source, prefix)
        logger.info("vision tower %s: features after layer %d, from %s", self.name, self.depth, source)

    def empty(self, source: Path, rows: int | None) -> nn.Module:
        """The tower up to the selected layer on the meta device, for a position table of `rows` rows in `source`."""
        for part in (self.settings, *self.settings.values()):
            check_depth(part.get("num_hidden_layers") if isinstance(part, dict) else None, source)
        config = copy.deepcopy(self.config)
        with config_errors(self.name), empty_weights():
            vision = self.spec.vision(config)
            configured = vision.image_size // vision.patch_size
            grid = configured if rows is None else math.isqrt(rows)  # with a row for the class token or without
            if grid != configured:
                logger.info("tower positions: the stored table is %dx%d, not for %d px", grid, grid, vision.image_size)
                vision.image_size = grid * vision.patch_size
            return self.spec.build(config, self.depth)

    def stored_shapes(self, from_checkpoint: bool) -> Shapes:
        """Names and shapes of the weights that `load_model` would read, from the headers of their files."""
        source, prefix, _ = self.source(from_checkpoint)
        shapes = weight_shapes(source).items()
        return {n.removeprefix(prefix): s for n, s in shapes if n.startswith(prefix) and self.needs(n, prefix)}

    def needs(self, name: str, prefix: str) -> bool:
        name = name.removeprefix(prefix)
        index = layer_index(name, self.spec.layers) if self.spec.layers else None
        return not name.startswith(self.spec.unused) and (index is None or index < self.depth)

    def source(self, from_checkpoint: bool) -> tuple[Path, str, int | None]:
        """The directory or file to read, the prefix of the tower's keys, and the rows of its position table."""
        if from_checkpoint and self.checkpoint_dir is not None and has_weights(self.checkpoint_dir):
            shapes = weight_shapes(self.checkpoint_dir)
            for prefix in TOWER_PREFIXES:
                stored = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
                if stored and self._is_complete(stored):
                    return self.checkpoint_dir, prefix, self._position_rows(stored)
        if self.directory is None:
            find_tower(self.name, self.checkpoint_dir)  # raises with the places tried
            raise CheckpointError(f"The vision tower {self.name!r} has settings but no weights; download them.")
        shapes = weight_shapes(self.directory)
        if self.spec.positions is not None and self.spec.positions not in shapes:
            raise CheckpointError(
                f"{self.directory} does not contain {self.spec.positions!r}, so it does not hold the tower "
                f"{self.name!r}; pass the directory or file of that tower."
            )
        return self.directory, "", self._position_rows(shapes)

    def _is_complete(self, shapes: Shapes) -> bool:
        layers = set() if self.spec.layers is None else {layer_index(name, self.spec.layers) for name in shapes}
        positioned = self.spec.positions is None or self.spec.positions in shapes
        return positioned and (self.spec.layers is None or layers >= set(range(self.depth)))

    def _position_rows(self, shapes: Shapes) -> int | None:
        return None if self.spec.positions is None else shapes[self.spec.positions][-2]

    def unused_tensors(self) -> dict[str, Tensor]:
        """The weights that were not loaded because no feature needs them, read now, so that a full save is complete."""
        if self._loaded_from is None:
            return {}
        source, prefix = self._loaded_from
        parts = {name for name, _ in self.vision_tower.named_children()}
        wanted = iter_tensors(source, lambda name: name.startswith(prefix) and not self.needs(name, prefix))
        rest = ((name.removeprefix(prefix), tensor) for name, tensor in wanted)
        return {f"vision_tower.{name}": tensor.to(self.dtype) for name, tensor in rest if name.split(".")[0] in parts}

    # --- Forward --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> VisionTower:
        """Set training mode; a frozen tower stays in eval mode."""
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and trainable)

    def forward(self, images: Tensor | Iterable[Tensor]) -> Any:
        """Features `(K, n, C)` of images `(K, 3, H, W)`, in their dtype; images `(3, H, W)` of a list one by one.

        A tower with queries returns a pair: patch features and query features `(K, q, hidden_size)`. Gradients flow
        only when a parameter of the tower is trainable.
        """
        if not isinstance(images, Tensor):
            return [self._encode(image.unsqueeze(0)) for image in images]
        return self._encode(images)

    def _encode(self, images: Tensor) -> Features:
        if not self.is_loaded:
            raise CheckpointError(f"The vision tower {self.name!r} is not loaded; call load_model() first.")
        trainable = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with nullcontext() if trainable else torch.no_grad():
            return self._features(self.vision_tower(images.to(self.device, self.dtype)), images.dtype)

    def _features(self, output: Any, dtype: torch.dtype) -> Features:
        features = self.feature_select(output).to(dtype)  # (K, n, C)
        queries = getattr(output, "query_features", None)
        return features if queries is None else (features, queries.to(dtype))

    @property
    def layers(self) -> list[nn.Module]:
        """The loaded layers; empty for towers that are not a plain sequence of layers."""
        if not self.is_loaded or self.spec.layers is None:
            return []
        return list(self.vision_tower.get_submodule(self.spec.layers.rstrip(".")).children())

    def encode_by_layer(
        self, images: Tensor, replacements: TowerLayers | None = None
    ) -> Generator[None, None, Features]:
        """As `forward` of images `(K, 3, H, W)` without gradients, in parts: yields after each layer.

        `replacements` run in place of the tower's layers. Towers whose layers have other inputs beside the tokens run
        as a whole.
        """
        layers, tokens, output = self.layers, None, None
        if layers:

            def stop(layer: nn.Module, *inputs: object) -> None:
                raise _FirstLayer(*inputs)

            hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
            try:
                output = self.vision_tower(images.to(self.device, self.dtype))
            except _FirstLayer as reached:
                (tokens, *more), kwargs = reached.args
                tokens = None if more or kwargs else tokens
            finally:
                hook.remove()
        if tokens is None:
            features = self._encode(images) if output is None else self._features(output, images.dtype)
            yield from [None] * max(1, len(layers))  # the work of all layers, which the caller counts
            return features
        for layer in layers if replacements is None else replacements:
            tokens = layer(tokens)
            yield
        return self._features(tokens, images.dtype)

    def feature_select(self, output: Any) -> Tensor:
        """Select features from the tokens `(K, T, C)` of the tower, given as such or as `last_hidden_state`.

        `patch` drops the class token, `cls_patch` keeps it; registers are dropped.
        """
        tokens: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
        patches = tokens[:, self.spec.class_token + self.spec.registers :]
        if self.select_feature == "patch":
            return patches
        return torch.cat([tokens[:, :1], patches], dim=1) if self.spec.registers else tokens


def find_tower(name: str, checkpoint_dir: Path | None = None) -> Path:
    """Find the local directory of a tower, or the weights file of `timm/NAME:FILE`; errors list every place tried.

    Order: the variable `LLAVA_VISION_TOWER`, the path as given, the path and then its last component relative to the
    checkpoint and beside it, the Hugging Face cache, the hub (unless offline).
    """
    name = os.environ.get(ENVIRONMENT) or name
    _, is_file, file = name.partition(":") if name.startswith(TIMM) else (name, "", "")
    path = file if is_file else name
    candidates = [Path(path)]
    if checkpoint_dir is not None:
        last = Path(path.rstrip("/")).name
        candidates += [checkpoint_dir / path, checkpoint_dir / last, checkpoint_dir.resolve().parent / last]
    for place in candidates:
        if os.path.isfile(place if is_file else place / "config.json"):  # noqa: PTH113 (as in require_directory)
            return place
    found, asked = (None, []) if is_file else snapshot(name, ["*.json", "*.safetensors", "*.bin"])
    if found is None:
        places = dict.fromkeys([*map(str, candidates), *asked])
        remedy = f"pass its directory with --vision-tower (or {ENVIRONMENT})"
        if name.startswith(TIMM):
            remedy = f"pass its weights with --vision-tower {name.partition(':')[0]}:FILE (or {ENVIRONMENT})"
        raise CheckpointError(
            f"The vision tower {name!r} was not found; tried {', '.join(places)}. Download it and {remedy}."
        )
    return found


def read_tower_settings(name: str, path: Path | None) -> dict[str, Any]:
    """The settings of a tower: its `config.json`, of a composite one the `vision_config`; or those timm has for a name.

    `path` is what `find_tower` found for `name`: a directory, the weights file of `timm/NAME:FILE`, or nothing.
    """
    if path is None or not path.is_dir():
        from llava.model.multimodal_encoder.timm_encoder import named_settings

        return named_settings(os.environ.get(ENVIRONMENT) or name)
    settings = read_json(path / "config.json")
    if "vision_config" in settings and settings.get("model_type") in ("clip", "intern_vit_6b"):
        return {"model_type": settings["model_type"], **settings["vision_config"]}
    return {"model_type": tower_type(settings), **settings} if "architecture" in settings else settings
